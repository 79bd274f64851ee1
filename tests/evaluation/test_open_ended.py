import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from minimind.data.textbook import DEMO_QUESTIONS
from minimind.errors import DataError, ServiceError, UsageError
from minimind.evaluation.catalogue import make_task
from minimind.evaluation.models import LocalModel
from minimind.evaluation.open_ended import OpenEndedTask, Prompt, read_prompts
from minimind.evaluation.runner import evaluate
from minimind.evaluation.tasks import Answer, GenerationConfig
from minimind.inference.generate import answer_all, generate_all
from minimind.inference.load import load_for_inference
from minimind.tokenizer.chat import Message, encode_chat

ME = {"model": "1"}


class FakeModel:
    """A model with prepared answers."""

    name = "fake"

    def __init__(self, *answers: Answer | Exception) -> None:
        self._answers = answers

    def answers(
        self, conversations: Sequence[Sequence[Message]], generation: GenerationConfig
    ) -> Iterator[tuple[int, Answer | Exception]]:
        yield from enumerate(self._answers)


def asked(question: str) -> list[Message]:
    return [{"role": "user", "content": question}]


def rows(path: Path, *values: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(v, ensure_ascii=False) + "\n" for v in values), "utf-8")
    return str(path)


def test_the_eight_questions_are_built_in() -> None:
    prompts, bad = read_prompts()
    assert tuple(prompt.question for prompt in prompts) == DEMO_QUESTIONS
    assert [prompt.id for prompt in prompts] == list("12345678")
    assert bad.total == 0
    assert len(read_prompts(limit=3)[0]) == 3


def test_a_text_file_has_one_question_per_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt.gz"
    path.write_bytes(gzip.compress("\ufeff甲？\r\n\n  乙？ \n丙？".encode()))
    assert read_prompts(str(path))[0] == [
        Prompt("1", "甲？"),
        Prompt("3", "乙？"),
        Prompt("4", "丙？"),
    ]


def test_questions_in_records_of_many_schemas(tmp_path: Path) -> None:
    path = rows(
        tmp_path / "mine.jsonl",
        {"id": "belle-0", "question": "甲？", "std_answer": "一", "class": "closed\u00a0qa"},
        {"question_id": 81, "category": "writing", "turns": ["乙？", "再说"]},
        {"messages": [{"role": "system", "content": "短"}, {"role": "user", "content": "丙？"}]},
        {"conversations": [{"from": "human", "value": "丁？"}, {"from": "gpt", "value": "是"}]},
        {"instruction": "翻译", "input": "hello", "output": "你好"},
        {"prompt": "戊？", "id": 81},
        {"answer": "没有问题"},
        {"question": "  "},
        {"question": 5, "turns": []},
        {"messages": [{"role": "wizard", "content": "己？"}]},
        {"system": "短", "instruction": "辛？", "history": [["庚？", "是"]], "id": "81 turn 2"},
        {"messages": [{"role": "user", "content": "壬？"}, {"role": "assistant", "content": None}]},
    )
    prompts, bad = read_prompts(path)
    assert prompts == [
        Prompt("belle-0", "甲？", "closed qa"),
        Prompt("81", "乙？", "writing"),
        Prompt("81 turn 2", "再说", "writing", ("81",)),
        Prompt("3", "丙？", system="短"),
        Prompt("4", "丁？"),
        Prompt("5", "翻译\nhello"),
        Prompt("81 2", "戊？"),
        Prompt("81 turn 2 2", "庚？", system="短"),
        Prompt("81 turn 2 2 turn 2", "辛？", after=("81 turn 2 2",), system="短"),
        Prompt("12", "壬？"),
    ]
    assert (bad.num_valid, bad.total) == (8, 4)
    assert "no question; its fields: answer" in bad.first
    assert [prompt.question for prompt in read_prompts(path, 2)[0]] == ["甲？", "翻译\nhello"]


def test_files_without_questions_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="contains no question"):
        read_prompts(rows(tmp_path / "none.jsonl", {"a": 1}))
    with pytest.raises(DataError, match="no such file"):
        read_prompts(str(tmp_path / "gone.txt"))
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(DataError):
        read_prompts(str(tmp_path / "blank.txt"))


def test_answers_and_metrics_of_a_local_model(
    local: LocalModel, varied_dir: Path, tmp_path: Path
) -> None:
    task = OpenEndedTask("answers", read_prompts()[0], GenerationConfig(24))
    summary = evaluate(task, local, tmp_path, identity=ME)
    model, tokenizer = load_for_inference(varied_dir, "cpu")
    expected = answer_all(model, tokenizer, DEMO_QUESTIONS, max_new_tokens=24)
    lines = (tmp_path / "answers.jsonl").read_text("utf-8").splitlines()[1:]
    answers = {line["id"]: line for line in map(json.loads, lines)}
    assert [answers[str(n)]["answer"] for n in range(1, 9)] == expected
    ended = [answers[str(n)]["ended"] for n in range(1, 9)]
    assert [answers[str(n)]["tokens"] == 24 for n in range(1, 9)] == [
        not stopped for stopped in ended
    ]
    assert summary["never_end"] == ended.count(False) / 8
    assert summary["answers"] == 8
    assert summary["tokens_per_second"] > 0
    assert "by_category" not in summary


def test_sampled_answers_depend_only_on_seed_and_question(local: LocalModel) -> None:
    def sample(questions: Sequence[str], seed: int) -> dict[str, str]:
        answers = local.answers(
            [asked(question) for question in questions],
            GenerationConfig(16, temperature=1.0, seed=seed, concurrency=3),
        )
        return {questions[n]: a.text for n, a in answers if isinstance(a, Answer)}

    complete = sample(DEMO_QUESTIONS, 1)
    assert len(complete) == 8
    assert sample(DEMO_QUESTIONS[:2:-1], 1).items() <= complete.items()
    assert sample(DEMO_QUESTIONS, 2) != complete


def test_settings_identify_questions_and_decoding(local: LocalModel, tmp_path: Path) -> None:
    prompts = read_prompts()[0]
    evaluate(
        OpenEndedTask("a", prompts[:1], GenerationConfig(2, seed=1)), local, tmp_path, identity=ME
    )
    again = evaluate(
        OpenEndedTask("a", prompts[:1], GenerationConfig(2, seed=2)), local, tmp_path, identity=ME
    )
    assert again["asked_now"] == 0  # greedy decoding ignores the seed
    for other in (
        OpenEndedTask("a", prompts[:1], GenerationConfig(3)),
        OpenEndedTask("a", prompts[:1], GenerationConfig(2, temperature=0.5)),
        OpenEndedTask("a", prompts[1:2], GenerationConfig(2)),
    ):
        with pytest.raises(UsageError, match="another evaluation"):
            evaluate(other, local, tmp_path, identity=ME)


def test_speed_length_categories_and_errors() -> None:
    prompts = [Prompt("1", "甲", "x"), Prompt("2", "乙", "y"), Prompt("3", "丙", "y")]
    task = OpenEndedTask("a", prompts, GenerationConfig(9))
    model = FakeModel(
        Answer("好的", 2, True, 0.5), ServiceError("gone"), Answer("好的好的", None, None, 7)
    )
    results = list(task.run(model, {}))  # type: ignore[arg-type]
    assert results[1] == {"id": "2", "error": "gone"}
    summary = task.summary([result for result in results if "error" not in result])
    assert summary["tokens"] == 2
    assert summary["characters"] == 3
    assert summary["tokens_per_second"] == 4
    assert summary["by_category"]["x"]["answers"] == 1
    assert task.with_metrics(results[0])["characters"] == 2
    assert task.with_metrics(results[1]) == {"error": "gone"}
    many = OpenEndedTask("a", [Prompt(str(n), "甲") for n in range(30)], GenerationConfig(9))
    with pytest.raises(ServiceError):
        list(many.run(FakeModel(*[ServiceError("gone")] * 30), {}))  # type: ignore[arg-type]


def test_all_messages_of_a_conversation_are_asked(
    local: LocalModel, varied_dir: Path, tmp_path: Path
) -> None:
    """With the model's own answers between them; also if the evaluation is resumed in between."""
    said = [{"role": "user", "content": "甲？"}, {"role": "assistant", "content": "忽略"}]
    said += [{"role": "user", "content": "为什么？"}]
    path = rows(
        tmp_path / "q.jsonl",
        {"messages": [{"role": "system", "content": "短"}, *said]},
        {"id": "b", "turns": ["乙？", "再说", "翻译"]},
    )
    task = OpenEndedTask("answers", read_prompts(path)[0], GenerationConfig(12))
    results = {result["id"]: result for result in task.run(local, {})}
    assert sorted(results) == ["1", "1 turn 2", "b", "b turn 2", "b turn 3"]
    model, tokenizer = load_for_inference(varied_dir, "cpu")
    for name, conversation in {
        "1 turn 2": [
            {"role": "system", "content": "短"},
            *asked("甲？"),
            {"role": "assistant", "content": results["1"]["answer"]},
            *asked("为什么？"),
        ],
        "b turn 3": [
            *asked("乙？"),
            {"role": "assistant", "content": results["b"]["answer"]},
            *asked("再说"),
            {"role": "assistant", "content": results["b turn 2"]["answer"]},
            *asked("翻译"),
        ],
    }.items():
        prompt = encode_chat(tokenizer, conversation, add_generation_prompt=True)[0]
        [expected] = generate_all(model, tokenizer, [prompt], max_new_tokens=12)
        text = tokenizer.decode(expected, skip_special_tokens=True).strip()
        assert results[name]["answer"] == text
    half = {name: results[name] for name in ("1", "b", "b turn 2")}
    rest = {result["id"]: result["answer"] for result in task.run(local, half)}
    assert rest == {name: results[name]["answer"] for name in ("1 turn 2", "b turn 3")}


def test_messages_after_a_failure_are_not_asked() -> None:
    prompts = [Prompt(str(n), "甲") for n in range(12)]
    prompts += [Prompt(f"{n} turn 2", "乙", after=(str(n),)) for n in range(12)]
    task = OpenEndedTask("a", prompts, GenerationConfig(9))

    class Failing(FakeModel):
        """Fails for all but each third conversation."""

        def answers(
            self, conversations: Sequence[Sequence[Message]], generation: GenerationConfig
        ) -> Iterator[tuple[int, Answer | Exception]]:
            for index in range(len(conversations)):
                failed = len(conversations) == 12 and index % 3
                yield index, ServiceError("gone") if failed else Answer("好")

    results = {r["id"]: r for r in task.run(Failing(), {})}  # type: ignore[arg-type]
    assert len(results) == 24
    assert results["3 turn 2"]["answer"] == "好"
    assert results["4 turn 2"] == {
        "id": "4 turn 2",
        "error": "the message before it, 4, failed",
    }


def test_a_question_that_exceeds_the_context_is_an_error(local: LocalModel, tmp_path: Path) -> None:
    path = tmp_path / "q.txt"
    path.write_text("短？\n" + "长江的水" * 400 + "\n", encoding="utf-8")
    results = {r["id"]: r for r in make_task(f"degeneration:{path}").run(local, {})}
    assert "answer" in results["1"]
    assert "context is 512" in results["2"]["error"]


def test_the_task_by_name() -> None:
    task = make_task("degeneration", data=["of-other-tasks"])
    assert len(task) == 8
    assert set(task.summary([])["metrics"].values()) == {None}
