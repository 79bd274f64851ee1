"""Preference pairs from a model's own answers: selection, resumption, and what is left out."""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from minimind.data.input_files import list_files
from minimind.data.invalid import InvalidRecords
from minimind.data.read import read_records
from minimind.data.textbook import DEMO_QUESTIONS
from minimind.errors import DataError, ServiceError, UsageError
from minimind.evaluation.models import LocalModel
from minimind.evaluation.own_answers import (
    AnsweredData,
    PairCounts,
    check_conversations,
    partial_file,
    read_conversations,
    write_pairs,
)
from minimind.evaluation.tasks import Answer, GenerationConfig, evenly_spaced
from minimind.inference.generate import generate_all
from minimind.inference.load import load_for_inference
from minimind.tokenizer.chat import Message, encode_chat

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


def data(conversations: Sequence[Sequence[Message]]) -> AnsweredData:
    return AnsweredData(conversations, 0, 0, InvalidRecords())


def write(path: Path, *values: dict[str, Any]) -> list[str]:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), "utf-8")
    return [str(path)]


def test_conversations_that_end_with_an_answer_are_evenly_spaced(tmp_path: Path) -> None:
    masked: list[dict[str, Any]] = [*chat("丑", "寅")]
    masked[1]["loss"] = False
    paths = write(
        tmp_path / "chats.jsonl",
        *({"messages": chat(str(n), "好")} for n in range(10)),
        {"messages": chat("子", "是", "为什么")},
        {"messages": masked},
        {"messages": "?"},
    )
    read = read_conversations(paths, 100)
    assert [messages[0]["content"] for messages in read.conversations] == list("0123456789")
    assert (read.unsuitable, read.with_variables, read.invalid.total) == (2, 0, 1)
    few = read_conversations(paths, 4).conversations
    assert few == evenly_spaced(read.conversations, 4)
    check_conversations(paths, {})
    texts = write(tmp_path / "texts.jsonl", {"text": "长江"}, {"nothing": 1})
    for function in (
        partial(read_conversations, limit=4),
        partial(check_conversations, variables={}),
    ):
        with pytest.raises(
            DataError, match=r"no conversation that ends.*invalid record: .*jsonl:2"
        ):
            function(texts)


def test_the_rejected_side_is_the_models_answer(
    local: LocalModel, varied_dir: Path, tmp_path: Path
) -> None:
    asked = [chat(question, "二。") for question in DEMO_QUESTIONS]
    asked += [chat("甲？", "一。", question, "二。") for question in DEMO_QUESTIONS]
    out = tmp_path / "pairs.jsonl"
    counts = write_pairs(local, data(asked), out, generation=GREEDY, identity=ME)
    model, tokenizer = load_for_inference(varied_dir, "cpu")
    prompts = [encode_chat(tokenizer, each[:-1], add_generation_prompt=True)[0] for each in asked]
    answers = generate_all(model, tokenizer, prompts, max_new_tokens=12)
    texts = [tokenizer.decode(answer).rstrip("\ufffd").strip() for answer in answers]
    expected = [
        (messages, [*messages[:-1], {"role": "assistant", "content": text}])
        for messages, text in zip(asked, texts, strict=True)
        if text
    ]
    records = read_records(list_files(str(out)), invalid=InvalidRecords(max_fraction=0))
    assert [(record.chosen, record.rejected) for record in records] == expected
    assert (counts.pairs, counts.empty) == (len(expected), 16 - len(expected))
    assert counts.pairs >= counts.cut > 0
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_equal_empty_and_failed_answers_make_no_pair(tmp_path: Path) -> None:
    conversations = [chat(question, "好。 ") for question in "abcd"]
    out = tmp_path / "pairs.jsonl"
    model: Any = FakeModel(a="好。", b="\ufffd", c=ServiceError("gone"), d="不好。\ufffd")
    counts = write_pairs(model, data(conversations), out, generation=GREEDY, identity=ME)
    assert counts == PairCounts(1, equal=1, empty=1, failed=1, first_error="gone")
    assert json.loads(out.read_text("utf-8")) == {
        "chosen": conversations[3],
        "rejected": chat("d", "不好。"),
    }
    with pytest.raises(
        DataError, match=r"1 failed .the first: gone., 1 answers equal.*1 are empty"
    ):
        write_pairs(
            model, data(conversations[:3]), tmp_path / "none.jsonl", generation=GREEDY, identity=ME
        )
    # The one that failed is repeated.
    model = FakeModel(c="是。")
    counts = write_pairs(model, data(conversations), out, generation=GREEDY, identity=ME)
    assert (counts.pairs, counts.failed, model.asked) == (2, 0, 1)
    assert not partial_file(out).exists()


def test_conversations_that_exceed_the_context_do_not_stop_the_others(
    local: LocalModel, tmp_path: Path
) -> None:
    fitting = [chat(question, "二。") for question in DEMO_QUESTIONS]
    conversations = [chat("长江的水" * 400, "一。")] * 12 + fitting
    out = tmp_path / "pairs.jsonl"
    counts = write_pairs(local, data(conversations), out, generation=GREEDY, identity=ME)
    assert (counts.pairs + counts.empty, counts.failed, counts.unanswerable) == (8, 0, 12)
    assert "context is 512" in counts.first_error
    assert not partial_file(out).exists()  # to ask them again does not help


def test_interrupted_work_is_continued(tmp_path: Path) -> None:
    conversations = [chat(question, "好") for question in "abc"]
    out = tmp_path / "pairs.jsonl"

    class Killed(FakeModel):
        def answers(self, *arguments: Any) -> Iterator[tuple[int, Answer | Exception]]:
            yield from list(super().answers(*arguments))[:2]
            raise KeyboardInterrupt

    answers = {"a": "一", "b": "二", "c": "三"}
    with pytest.raises(KeyboardInterrupt):
        write_pairs(Killed(**answers), data(conversations), out, generation=GREEDY, identity=ME)  # type: ignore[arg-type]
    assert not out.exists()
    other: Any = FakeModel()
    message = r"evaluation \(model differ\); choose another --out, or remove pairs.jsonl.part"
    with pytest.raises(UsageError, match=message):
        write_pairs(other, data(conversations), out, generation=GREEDY, identity={"model": "2"})
    model: Any = FakeModel(**answers)
    counts = write_pairs(model, data(conversations), out, generation=GREEDY, identity=ME)
    assert (counts.pairs, counts.discarded, model.asked) == (3, 0, 1)
    lines = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [line["rejected"][-1]["content"] for line in lines] == ["一", "二", "三"]


def test_answers_of_another_model_are_replaced_on_request(tmp_path: Path) -> None:
    out = tmp_path / "pairs.jsonl"
    questions = data([chat(question, "好") for question in "ab"])
    first: Any = FakeModel(a="一", b=ServiceError("gone"))
    write_pairs(first, questions, out, generation=GREEDY, identity=ME)
    with pytest.raises(UsageError, match=r"or remove pairs.jsonl.part and pairs.jsonl$"):
        write_pairs(first, questions, out, generation=GREEDY, identity={"model": "2"})
    other: Any = FakeModel(a="二", b="三")
    counts = write_pairs(
        other, questions, out, generation=GREEDY, identity={"model": "2"}, replace=True
    )
    assert (counts.pairs, counts.discarded, other.asked) == (2, 2, 2)
    lines = map(json.loads, out.read_text("utf-8").splitlines())
    assert [line["rejected"][-1]["content"] for line in lines] == ["二", "三"]


def test_those_that_failed_are_asked_last(tmp_path: Path) -> None:
    """Otherwise ten that fail again would stop the command before the others are asked."""
    failing = {str(n): ServiceError("gone") for n in range(9)}
    questions = data([chat(name, "好") for name in (*failing, "a", "b", *"cdefghij")])
    out = tmp_path / "pairs.jsonl"
    answers: dict[str, Any] = {name: "一" for name in "abcdefghij"}
    model: Any = FakeModel(**failing, **answers | {"a": ServiceError("gone")})
    with pytest.raises(ServiceError, match="gone"):
        write_pairs(model, questions, out, generation=GREEDY, identity=ME)
    model = FakeModel(**failing, **answers)
    counts = write_pairs(model, questions, out, generation=GREEDY, identity=ME)
    assert (counts.pairs, counts.failed) == (10, 9)


def test_template_variables_have_values_or_their_conversations_are_left_out(
    tmp_path: Path,
) -> None:
    paths = write(
        tmp_path / "chats.jsonl",
        {"messages": chat("你是谁？", "我是{{name}}。")},
        {"messages": chat("你好", "你好。")},
    )
    read = read_conversations(paths, 9)
    assert (len(read.conversations), read.with_variables) == (1, 1)
    read = read_conversations(paths, 9, {"name": "小夜"})
    assert (read.conversations[0][-1]["content"], read.with_variables) == ("我是小夜。", 0)
    with pytest.raises(DataError, match=r"ends with an answer, 1 with template variables"):
        read_conversations(write(tmp_path / "one.jsonl", {"messages": chat("?", "{{name}}")}), 9)
