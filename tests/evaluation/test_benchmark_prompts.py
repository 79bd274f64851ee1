"""Prompts to the character: other programs' figures are compared with what they give."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minimind.evaluation.benchmark_prompts import Asked, PromptBuilder, Style, choose
from minimind.evaluation.benchmarks import BENCHMARKS, Benchmark, Question
from minimind.evaluation.encoding import OwnPromptEncoder
from minimind.evaluation.scoring import EngineScorer
from minimind.model import Transformer
from minimind.tokenizer import Tokenizer, encode_chat
from tests.support.foreign import CHATTING

QUESTION = Question("logic-0", "logic", " 泰山在哪里？ ", ("山东省", "四川", "青海", "北京"), 0)
EXAMPLE = Question("logic-1", "logic", "长江最后流入____。", ("黄海", "东海", "南海", "渤海"), 1)
ENGLISH = Question("anatomy-0", "anatomy", "Where is it?", ("here", "there", "no", "yes"), 3)


def ask(
    tokenizer: Tokenizer,
    exam: Benchmark,
    style: Style,
    question: Question,
    *examples: Question,
    shots: int = 5,
    context: int = 2048,
) -> Asked:
    return PromptBuilder(OwnPromptEncoder(tokenizer), exam, style, shots, context).ask(
        question, examples
    )


def texts(tokenizer: Tokenizer, asked: Asked) -> list[tuple[str, str]]:
    """(what is given, what is scored) of each row."""
    return [
        (tokenizer.decode(row.tokens[: row.start]), tokenizer.decode(row.tokens[row.start :]))
        for row in asked.rows
    ]


def test_chat_is_asked_as_minimind_v1_asked(tokenizer: Tokenizer) -> None:
    asked = ask(tokenizer, BENCHMARKS["ceval"], "chat", QUESTION, EXAMPLE)
    prompt = (
        "<|im_start|>system\n开始回答问题<|im_end|>\n"
        "<|im_start|>user\n 泰山在哪里？ 。选择 A: 山东省, B: 四川, C: 青海, D: 北京<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert texts(tokenizer, asked) == [(prompt, letter) for letter in "ABCD"]
    assert (asked.shots, asked.sizes) == (0, (1, 1, 1, 1))
    [(english, _), *_] = texts(tokenizer, ask(tokenizer, BENCHMARKS["mmlu"], "chat", ENGLISH))
    assert "system\nAnswer the question<" in english
    assert "user\nWhere is it? Choose A: here, B: there, C: no, D: yes<" in english


@pytest.mark.parametrize(
    ("exam", "head"),
    [
        ("ceval", "以下是中国关于逻辑学的单项选择题，请选出其中的正确答案。\n\n"),
        ("mine", "以下是单项选择题，请选出其中的正确答案。\n\n"),
    ],
)
def test_letters_are_asked_as_lm_eval_asks(tokenizer: Tokenizer, exam: str, head: str) -> None:
    which = BENCHMARKS.get(exam, Benchmark(exam, "test", ""))
    block = "泰山在哪里？\nA. 山东省\nB. 四川\nC. 青海\nD. 北京\n答案："
    solved = "长江最后流入____。\nA. 黄海\nB. 东海\nC. 南海\nD. 渤海\n答案： B\n\n"
    none = ask(tokenizer, which, "letter", QUESTION, EXAMPLE, shots=0)
    assert texts(tokenizer, none) == [(head + block, f" {letter}") for letter in "ABCD"]
    one = ask(tokenizer, which, "letter", QUESTION, EXAMPLE)
    assert texts(tokenizer, one) == [(head + solved + block, f" {letter}") for letter in "ABCD"]
    assert (none.shots, one.shots) == (0, 1)


def test_letters_of_the_other_exams(tokenizer: Tokenizer) -> None:
    chinese = Question("0", "anatomy", "问题", ("甲", "乙"), 0)
    assert texts(tokenizer, ask(tokenizer, BENCHMARKS["cmmlu"], "letter", chinese)) == [
        (
            "以下是关于解剖学的单项选择题，请直接给出正确答案的选项。\n\n"
            "问题\nA. 甲\nB. 乙\n答案：",
            f" {letter}",
        )
        for letter in "AB"
    ]
    assert texts(tokenizer, ask(tokenizer, BENCHMARKS["mmlu"], "letter", ENGLISH))[3] == (
        "The following are multiple choice questions (with answers) about anatomy.\n\n"
        "Where is it?\nA. here\nB. there\nC. no\nD. yes\nAnswer:",
        " D",
    )
    passage = Question("0", "c3-m", "问题", ("甲", "乙"), 0, "一段话。")
    [(prompt, _), _] = texts(tokenizer, ask(tokenizer, BENCHMARKS["c3"], "letter", passage))
    assert prompt.endswith("答案。\n\n一段话。\n问题\nA. 甲\nB. 乙\n答案：")


def test_answers_are_weighed_by_their_bytes(tokenizer: Tokenizer) -> None:
    asked = ask(tokenizer, BENCHMARKS["ceval"], "answer", QUESTION, EXAMPLE)
    head = "以下是中国关于逻辑学的单项选择题，请选出其中的正确答案。\n\n"
    prompt = head + "长江最后流入____。\n答案： 东海\n\n泰山在哪里？\n答案："
    expected = [(prompt, f" {option}") for option in QUESTION.options]
    assert texts(tokenizer, asked) == expected
    assert asked.sizes == (9, 6, 6, 6)
    assert choose(asked, [-8.0, -6.0, -6.0, -7.0]) == 0
    assert choose(asked, [-9.5, -6.0, -6.0, -7.0]) == 1  # the first of equals


def test_examples_that_do_not_fit_are_left_out(tokenizer: Tokenizer) -> None:
    full = ask(tokenizer, BENCHMARKS["ceval"], "letter", QUESTION, *[EXAMPLE] * 3)
    longest = max(len(row.tokens) for row in full.rows) - 1
    same = ask(tokenizer, BENCHMARKS["ceval"], "letter", QUESTION, *[EXAMPLE] * 3, context=longest)
    less = ask(
        tokenizer, BENCHMARKS["ceval"], "letter", QUESTION, *[EXAMPLE] * 3, context=longest - 1
    )
    assert (full.shots, same.shots, less.shots) == (3, 3, 2)
    assert not less.cut


@pytest.mark.parametrize("style", ["chat", "letter", "answer"])
def test_a_question_that_does_not_fit_loses_its_beginning(
    tokenizer: Tokenizer, varied: Transformer, style: Style
) -> None:
    whole = ask(tokenizer, BENCHMARKS["ceval"], style, QUESTION)
    asked = ask(tokenizer, BENCHMARKS["ceval"], style, QUESTION, context=12)
    assert asked.cut
    for row, full in zip(asked.rows, whole.rows, strict=True):
        assert len(row.tokens) <= 13
        assert row.tokens == full.tokens[-len(row.tokens) :]
        assert row.tokens[row.start :] == full.tokens[full.start :]
    [scores] = EngineScorer(varied, tokenizer, 12).score([asked.rows])
    assert isinstance(scores, list) and len(scores) == 4


def test_an_answer_longer_than_the_context_is_cut_too(
    tokenizer: Tokenizer, varied: Transformer
) -> None:
    long = Question("0", "logic", "？", ("山" * 50, "东"), 1)
    asked = ask(tokenizer, BENCHMARKS["ceval"], "answer", long, context=12)
    assert asked.cut
    assert all(0 < row.start < len(row.tokens) <= 13 for row in asked.rows)
    [scores] = EngineScorer(varied, tokenizer, 12).score([asked.rows])
    assert isinstance(scores, list) and torch.isfinite(torch.tensor(scores)).all()


@pytest.mark.parametrize("name", CHATTING)
def test_letters_in_the_formats_of_others(foreign_dir: Callable[[str], Path], name: str) -> None:
    tokenizer = Tokenizer.load(foreign_dir(name))
    asked = ask(tokenizer, BENCHMARKS["ceval"], "chat", QUESTION)
    messages = [
        {"role": "system", "content": "开始回答问题"},
        {"role": "user", "content": " 泰山在哪里？ 。选择 A: 山东省, B: 四川, C: 青海, D: 北京"},
    ][name == "llama2" :]  # whose format refuses a system message
    prompt, _ = encode_chat(tokenizer, messages, add_generation_prompt=True)
    for row, letter in zip(asked.rows, "ABCD", strict=True):
        assert list(row.tokens[: row.start]) == prompt
        assert tokenizer.decode(row.tokens[row.start :]).strip() == letter
