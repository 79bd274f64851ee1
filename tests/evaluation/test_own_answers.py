"""Preference pairs from a model's own answers: selection, resumption, and what is left out."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from minimind.data.input_files import list_files
from minimind.data.invalid import InvalidRecords
from minimind.data.read import read_records
from minimind.errors import DataError, ServiceError, UsageError
from minimind.evaluation.models import LocalModel
from minimind.evaluation.own_answers import PairCounts, read_conversations, write_pairs
from minimind.evaluation.tasks import Answer, GenerationConfig
from minimind.inference.generate import answer_all
from minimind.inference.load import load_for_inference
from minimind.tokenizer.chat import Message

ME = {"model": "1"}
GREEDY = GenerationConfig(12)


class FakeModel:
    """A model with prepared answers, by question; it counts the questions."""

    name = "fake"

    def __init__(self, **answers: str | Exception) -> None:
        self._answers, self.asked = answers, 0

    def answers(
        self, conversations: Sequence[Sequence[Message]], generation: GenerationConfig
    ) -> Iterator[tuple[int, Answer | Exception]]:
        for index, messages in enumerate(conversations):
            self.asked += 1
            answer = self._answers[messages[-1]["content"]]
            yield index, Answer(answer) if isinstance(answer, str) else answer


def chat(*texts: str) -> list[Message]:
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]


def write(path: Path, *values: dict[str, Any]) -> list[str]:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), "utf-8")
    return [str(path)]


def test_conversations_that_end_with_an_answer_are_evenly_spaced(tmp_path: Path) -> None:
    excluded = chat("丑", "寅")
    excluded[1]["loss"] = False  # type: ignore[assignment]
    paths = write(
        tmp_path / "chats.jsonl",
        *({"messages": chat(str(n), "好")} for n in range(10)),
        {"messages": chat("子", "是", "为什么")},
        {"messages": excluded},
        {"messages": "?"},
    )
    conversations, invalid = read_conversations(paths, 100)
    assert [messages[0]["content"] for messages in conversations] == list("0123456789")
    assert invalid.total == 1
    assert [messages[0]["content"] for messages in read_conversations(paths, 4)[0]] == [
        *("0", "3", "5", "8")
    ]
    with pytest.raises(DataError, match="no conversation that ends with an answer"):
        read_conversations(write(tmp_path / "texts.jsonl", {"text": "长江"}), 4)


def test_the_rejected_side_is_the_models_answer(
    local: LocalModel, varied_dir: Path, tmp_path: Path
) -> None:
    conversations = [chat("甲？", "一。"), chat("乙？", "二。", "为什么？", "三。")]
    out = tmp_path / "pairs.jsonl"
    counts = write_pairs(local, conversations, out, generation=GREEDY, identity=ME)
    assert counts == PairCounts(2, 0, 0, 0)
    first, second = read_records(list_files(str(out)), invalid=InvalidRecords(max_fraction=0))
    assert [first.chosen, second.chosen] == conversations
    assert second.rejected and second.rejected[:-1] == conversations[1][:-1]
    model, tokenizer = load_for_inference(varied_dir, "cpu")
    [expected] = answer_all(model, tokenizer, ["甲？"], max_new_tokens=12)
    assert first.rejected == chat("甲？", expected)
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_equal_empty_and_failed_answers_make_no_pair(tmp_path: Path) -> None:
    conversations = [chat(question, "好。 ") for question in "abcd"]
    out = tmp_path / "pairs.jsonl"
    model: Any = FakeModel(a="好。", b="", c=ServiceError("gone"), d="不好。")
    counts = write_pairs(model, conversations, out, generation=GREEDY, identity=ME)
    assert counts == PairCounts(1, 1, 1, 1, "gone")
    assert json.loads(out.read_text("utf-8")) == {
        "chosen": conversations[3],
        "rejected": chat("d", "不好。"),
    }
    with pytest.raises(
        DataError, match=r"1 failed .the first: gone., 1 answers equal.*1 are empty"
    ):
        write_pairs(
            model, conversations[:3], tmp_path / "none.jsonl", generation=GREEDY, identity=ME
        )


def test_interrupted_work_is_continued(tmp_path: Path) -> None:
    conversations = [chat(question, "好") for question in "abc"]
    out = tmp_path / "pairs.jsonl"

    class Killed(FakeModel):
        def answers(self, *arguments: Any) -> Iterator[tuple[int, Answer | Exception]]:
            yield from list(super().answers(*arguments))[:2]
            raise KeyboardInterrupt

    answers = {"a": "一", "b": "二", "c": "三"}
    with pytest.raises(KeyboardInterrupt):
        write_pairs(Killed(**answers), conversations, out, generation=GREEDY, identity=ME)  # type: ignore[arg-type]
    assert not out.exists()
    with pytest.raises(UsageError, match=r"pairs.jsonl.part: has answers of another model"):
        write_pairs(FakeModel(), conversations, out, generation=GREEDY, identity={"model": "2"})  # type: ignore[arg-type]
    model: Any = FakeModel(**answers)
    counts = write_pairs(model, conversations, out, generation=GREEDY, identity=ME)
    assert (counts.pairs, model.asked) == (3, 1)
    lines = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [line["rejected"][-1]["content"] for line in lines] == ["一", "二", "三"]
