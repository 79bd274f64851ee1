import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from minimind.errors import RejectedRequestError, ServiceError, UsageError
from minimind.evaluation.judge import Trial, judge, make_trials, verdicts
from minimind.evaluation.open_ended import Prompt
from minimind.tokenizer.chat import Message

ME = {"url": "1"}
TRIAL = Trial(Prompt("1", "甲？"), ("a", "b"), ("一", "二"))


def reply(*scores: float, reason: str = "因为") -> str:
    named = dict(zip("AB", scores, strict=False))
    return json.dumps({"reason": reason, **named}, ensure_ascii=False)


def answers_of(messages: Sequence[Message]) -> list[str]:
    """Return the answers that a judge sees."""
    parts = messages[-1]["content"].split("[answer ")[1:]
    return [part.split("]\n", 1)[1].split("\n[end of answer")[0] for part in parts]


def by_length(messages: Sequence[Message]) -> str:
    return reply(*(min(len(answer), 100) for answer in answers_of(messages)))


def by_last_length(messages: Sequence[Message]) -> str:
    texts = (answer.rpartition("[the answer to judge] ")[2] for answer in answers_of(messages))
    return reply(*(min(len(text), 100) for text in texts))


def judged(ask: Any, answers: dict[str, dict[str, str]], path: Path) -> dict[str, Any]:
    prompts = [Prompt(name, f"问题{name}") for name in next(iter(answers.values()))]
    trials = make_trials(prompts, answers)
    return verdicts(trials, judge(ask, trials, path, identity=ME), list(answers))


def lengths(seed: int, mean: int, questions: int = 40) -> dict[str, str]:
    rng = random.Random(seed)
    return {str(n): "字" * rng.randint(mean - 9, mean + 9) for n in range(questions)}


@pytest.mark.parametrize(
    "text",
    [
        '{"reason": "好", "A": 80, "B": 59.5}',
        ' \n{"A": 80, "B": 59.5, "reason": "好"}\n',
        '```json\n{"reason": "好", "A": 80, "B": 59.5}\n```',
        '<think>A is {"A": 1}</think>\n\n```\n{"reason": "好", "A": 80, "B": 59.5}\n```',
    ],
)
def test_valid_replies_are_parsed(text: str) -> None:
    assert TRIAL.parse(text) == ("好", [80.0, 59.5])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A is better: 80 to 60.",
        'Here it is: {"reason": "好", "A": 80, "B": 60}',
        '{"reason": "好", "A": 80}',
        '{"reason": "好", "A": 80, "B": 60, "C": 1}',
        '{"reason": "好", "A": "80", "B": 60}',
        '{"reason": "好", "A": true, "B": 60}',
        '{"reason": "好", "A": 101, "B": 60}',
        '{"reason": "好", "A": -1, "B": 60}',
        '{"reason": "好", "A": NaN, "B": 60}',
        '{"reason": "好", "A": 80, "A": 90, "B": 60}',
        '{"reason": " ", "A": 80, "B": 60}',
        '{"reason": ["好"], "A": 80, "B": 60}',
        '[{"reason": "好", "A": 80, "B": 60}]',
        '{"reason": "好", "A": 80, "B": 6',
        "[" * 100_000,
    ],
)
def test_invalid_replies_are_rejected(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        TRIAL.parse(text)


def test_every_pair_is_judged_in_both_orders() -> None:
    answers = {name: {"1": name * 3, "2": name} for name in "abc"}
    del answers["c"]["2"]
    trials = make_trials([Prompt("1", "甲？"), Prompt("2", "乙？")], answers)
    order = [(trial.prompt.id, *trial.models) for trial in trials]
    pairs = [("a", "b"), ("a", "c"), ("b", "c")]
    assert sorted(order) == sorted(
        [("1", *order) for pair in pairs for order in (pair, pair[::-1])]
        + [("2", "a", "b"), ("2", "b", "a")]
    )
    assert all(t.answers == tuple(answers[m][t.prompt.id] for m in t.models) for t in trials)
    assert make_trials([Prompt("1", "甲？"), Prompt("2", "乙？")], answers) == trials


def test_the_first_order_is_random() -> None:
    prompts = [Prompt(str(n), "问") for n in range(200)]
    same = {str(n): "答" for n in range(200)}
    first = [trial.models[0] for trial in make_trials(prompts, {"a": same, "b": same})[::2]]
    assert 70 < first.count("a") < 130


def test_messages_have_the_answers_in_order_and_mark_empty_ones() -> None:
    messages = Trial(Prompt("1", "为什么？"), ("a", "b"), ("{x}", "")).messages()
    assert answers_of(messages) == ["{x}", "(no word)"]
    assert "为什么？" in messages[1]["content"]
    assert '{"reason": "…", "A": 0-100, "B": 0-100}' in messages[1]["content"]


def test_the_judge_sees_the_conversation_before_an_answer() -> None:
    prompts = [Prompt("1", "甲？"), Prompt("1 turn 2", "乙？", after=("1",))]
    answers = {"a": {"1": "一", "1 turn 2": "二"}, "b": {"1": "三", "1 turn 2": "四"}}
    first, _, trial, _ = make_trials(prompts, answers)
    assert set(first.answers) == {"一", "三"}
    assert set(trial.answers) == {
        "[earlier question] 甲？\n[its answer] 一\n\n[the answer to judge] 二",
        "[earlier question] 甲？\n[its answer] 三\n\n[the answer to judge] 四",
    }
    assert "[question]\n乙？\n[end of question]" in trial.messages()[-1]["content"]


def test_empty_answers_and_system_messages_are_shown() -> None:
    prompts = [Prompt("1", "甲？", system="短"), Prompt("2", "乙？", after=("1",), system="短")]
    first, second = make_trials(prompts, {"a": {"1": "", "2": ""}})
    assert first.answers == ("[system message] 短\n\n[the answer to judge] (no word)",)
    assert second.answers[0].endswith("[its answer] (no word)\n\n[the answer to judge] (no word)")


def test_questions_of_a_conversation_are_drawn_together(tmp_path: Path) -> None:
    """Equal scores within each conversation: the interval is that of a fifth of the questions."""
    apart = {"a": lengths(1, 30, 50), "b": lengths(2, 30, 50)}
    together = {m: {n: texts[str(int(n) // 5)] for n in texts} for m, texts in apart.items()}
    prompts = [
        Prompt(str(n), f"问题{n}", after=tuple(map(str, range(n - n % 5, n)))) for n in range(50)
    ]

    def widths(prompts: list[Prompt], answers: dict[str, dict[str, str]], name: str) -> float:
        trials = make_trials(prompts, answers)
        found = verdicts(
            trials, judge(by_last_length, trials, tmp_path / name, identity=ME), list(answers)
        )
        low, high = found["ranking"][0]["score_interval"]
        return float(high - low)

    single = [Prompt(str(n), f"问题{n}") for n in range(50)]
    assert widths(prompts, together, "1") > 1.6 * widths(single, together, "2")


def test_a_judge_of_length_ranks_by_length(tmp_path: Path) -> None:
    answers = {"short": lengths(1, 20), "long": lengths(2, 70), "middle": lengths(3, 45)}
    metrics = judged(by_length, answers, tmp_path / "j")
    assert (metrics["trials"], metrics["read"], metrics["failed"]) == (240, 240, 0)
    assert [row["model"] for row in metrics["ranking"]] == ["long", "middle", "short"]
    for rank, row in enumerate(metrics["ranking"], start=1):
        own = [len(text) for text in answers[row["model"]].values()]
        mean = sum(own) / 40
        assert row["score"] == pytest.approx(mean)
        error = math.sqrt(sum((x - mean) ** 2 for x in own)) / 40
        assert row["score_interval"] == pytest.approx(
            (mean - 1.96 * error, mean + 1.96 * error), abs=error / 3
        )
        assert (row["rank"], row["rank_interval"], row["questions"]) == (rank, [rank, rank], 40)
    assert [row["wins"] for row in metrics["ranking"]] == [1, 0.5, 0]
    assert (metrics["pairs"], metrics["position_consistency"]) == (120, 1)
    assert metrics["first_preferred"] == 0.5
    assert metrics["by_question"]["7"] == {m: len(texts["7"]) for m, texts in answers.items()}


def test_a_judge_with_position_bias_gives_no_ranking(tmp_path: Path) -> None:
    answers = {"a": lengths(1, 20), "b": lengths(2, 70)}
    metrics = judged(lambda messages: reply(90, 30), answers, tmp_path / "j")
    assert (metrics["position_consistency"], metrics["first_preferred"]) == (0, 1)
    assert metrics["position_consistency_interval"][0] == 0
    assert [(row["score"], row["wins"], row["rank"]) for row in metrics["ranking"]] == [
        (60, 0.5, 1),
        (60, 0.5, 1),
    ]


def test_ties_are_consistent_and_count_half(tmp_path: Path) -> None:
    answers = {"a": lengths(1, 20), "b": lengths(2, 20)}
    metrics = judged(lambda messages: reply(50, 50), answers, tmp_path / "j")
    assert (metrics["position_consistency"], metrics["first_preferred"]) == (1, None)
    assert [row["wins"] for row in metrics["ranking"]] == [0.5, 0.5]


def test_intervals_cover_the_true_means_and_close_ranks_are_uncertain(tmp_path: Path) -> None:
    """95 % intervals contain the known means about 95 % of the time."""
    rng = random.Random(5)
    covered = uncertain = 0
    for trial in range(60):
        means = {"a": 50.0, "b": 51.0}
        answers = {
            m: {str(n): f"{rng.gauss(mean, 10)}" for n in range(30)} for m, mean in means.items()
        }
        metrics = judged(
            lambda messages: reply(*map(float, answers_of(messages))),
            answers,
            tmp_path / f"{trial}",
        )
        for row in metrics["ranking"]:
            low, high = row["score_interval"]
            covered += low <= means[row["model"]] <= high
            uncertain += row["rank_interval"] == [1, 2]
    assert 106 <= covered <= 120
    assert uncertain > 90


def test_a_pair_counts_only_if_both_orders_were_read(tmp_path: Path) -> None:
    def half(messages: Sequence[Message]) -> str:
        first = answers_of(messages)[0]
        return "A, clearly." if first == "长长" else by_length(messages)

    metrics = judged(half, {"a": {"1": "短"}, "b": {"1": "长长"}}, tmp_path / "j")
    assert (metrics["read"], metrics["unreadable"]) == (1, 1)
    assert metrics["unreadable_because"] == {"not JSON: Expecting value": 1}
    assert metrics["ranking"] == []
    assert "position_consistency" not in metrics
    kept = [json.loads(line) for line in (tmp_path / "j").read_text("utf-8").splitlines()[1:]]
    assert {line.get("reply") for line in kept} == {None, "A, clearly."}


def test_a_single_model_is_scored(tmp_path: Path) -> None:
    metrics = judged(by_length, {"a": {"1": "短", "2": "长长长"}}, tmp_path / "j")
    assert (metrics["trials"], metrics["read"]) == (2, 2)
    assert [(row["score"], row["wins"]) for row in metrics["ranking"]] == [(2, None)]
    assert "pairs" not in metrics


def test_judged_trials_are_not_repeated(tmp_path: Path) -> None:
    requests: list[Sequence[Message]] = []

    def ask(messages: Sequence[Message]) -> str:
        requests.append(messages)
        if len(requests) == 3:
            raise ServiceError("gone")
        return by_length(messages)

    path = tmp_path / "j"
    answers = {"a": lengths(1, 20, 4), "b": lengths(2, 30, 4)}
    first = judged(ask, answers, path)
    assert (first["read"], first["failed"], first["first_error"]) == (7, 1, "gone")
    second = judged(ask, answers, path)
    assert (len(requests), second["read"], second["failed"]) == (9, 8, 0)
    answers["a"]["2"] = "改了"
    assert judged(ask, answers, path)["read"] == 8
    assert len(requests) == 11
    answers["c"] = lengths(3, 40, 4)
    assert judged(ask, answers, path)["trials"] == 24
    assert len(requests) == 27
    trials = make_trials([Prompt("1", "甲？")], answers)
    with pytest.raises(UsageError, match="another evaluation"):
        judge(ask, trials, path, identity={"url": "2"})


def test_judging_stops_after_consecutive_errors(tmp_path: Path) -> None:
    def ask(messages: Sequence[Message]) -> str:
        raise ServiceError("no luck")

    metrics = judged(ask, {"a": lengths(1, 20), "b": lengths(2, 30)}, tmp_path / "j")
    assert (metrics["read"], metrics["failed"], metrics["first_error"]) == (0, 80, "no luck")
    assert len((tmp_path / "j").read_text("utf-8").splitlines()) == 11

    def reject(messages: Sequence[Message]) -> str:
        raise RejectedRequestError("too long")

    metrics = judged(reject, {"a": lengths(1, 20), "b": lengths(2, 30)}, tmp_path / "k")
    assert (metrics["failed"], metrics["first_error"]) == (80, "too long")
    assert len((tmp_path / "k").read_text("utf-8").splitlines()) == 81
