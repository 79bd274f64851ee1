"""Prompts, compared character by character with those of lm-eval and MiniMind v1."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minimind.evaluation.benchmark_prompts import ChoicePrompt, PromptBuilder, Style, choose
from minimind.evaluation.benchmarks import BENCHMARKS, Benchmark, Question
from minimind.evaluation.encoding import MinimindEncoder
from minimind.evaluation.scoring import EngineScorer
from minimind.model import Transformer
from minimind.tokenizer import Tokenizer, encode_chat
from tests.support.foreign import CHATTING

QUESTION = Question("logic-0", "logic", " 泰山在哪里？ ", ("山东省", "四川", "青海", "北京"), 0)
EXAMPLE = Question("logic-1", "logic", "长江最后流入____。", ("黄海", "东海", "南海", "渤海"), 1)
ENGLISH = Question("anatomy-0", "anatomy", "Where is it?", ("here", "there", "no", "yes"), 3)


def build(
    tokenizer: Tokenizer,
    benchmark: Benchmark,
    style: Style,
    question: Question,
    *examples: Question,
    shots: int = 5,
    context: int = 2048,
) -> ChoicePrompt:
    builder = PromptBuilder(MinimindEncoder(tokenizer), benchmark, style, shots, context)
    return builder.build(question, examples)


def texts(tokenizer: Tokenizer, prompt: ChoicePrompt) -> list[tuple[str, str]]:
    """Return (prompt, scored continuation) of each row."""
    return [
        (tokenizer.decode(row.tokens[: row.start]), tokenizer.decode(row.tokens[row.start :]))
        for row in prompt.rows
    ]


def test_chat_style_equals_minimind_v1(tokenizer: Tokenizer) -> None:
    prompt = build(tokenizer, BENCHMARKS["ceval"], "chat", QUESTION, EXAMPLE)
    text = (
        "<|im_start|>system\n开始回答问题<|im_end|>\n"
        "<|im_start|>user\n 泰山在哪里？ 。选择 A: 山东省, B: 四川, C: 青海, D: 北京<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert texts(tokenizer, prompt) == [(text, letter) for letter in "ABCD"]
    assert (prompt.shots, prompt.divisors) == (0, (1, 1, 1, 1))
    [(english, _), *_] = texts(tokenizer, build(tokenizer, BENCHMARKS["mmlu"], "chat", ENGLISH))
    assert "system\nAnswer the question<" in english
    assert "user\nWhere is it? Choose A: here, B: there, C: no, D: yes<" in english


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("ceval", "以下是中国关于逻辑学的单项选择题，请选出其中的正确答案。\n\n"),
        ("mine", "以下是单项选择题，请选出其中的正确答案。\n\n"),
    ],
)
def test_letter_style_equals_lm_eval(tokenizer: Tokenizer, name: str, head: str) -> None:
    benchmark = BENCHMARKS.get(name, Benchmark(name, "test", ""))
    block = "泰山在哪里？\nA. 山东省\nB. 四川\nC. 青海\nD. 北京\n答案："
    solved = "长江最后流入____。\nA. 黄海\nB. 东海\nC. 南海\nD. 渤海\n答案： B\n\n"
    none = build(tokenizer, benchmark, "letter", QUESTION, EXAMPLE, shots=0)
    assert texts(tokenizer, none) == [(head + block, f" {letter}") for letter in "ABCD"]
    one = build(tokenizer, benchmark, "letter", QUESTION, EXAMPLE)
    assert texts(tokenizer, one) == [(head + solved + block, f" {letter}") for letter in "ABCD"]
    assert (none.shots, one.shots) == (0, 1)


def test_letter_style_of_other_benchmarks(tokenizer: Tokenizer) -> None:
    chinese = Question("0", "anatomy", "问题", ("甲", "乙"), 0)
    assert texts(tokenizer, build(tokenizer, BENCHMARKS["cmmlu"], "letter", chinese)) == [
        (
            "以下是关于解剖学的单项选择题，请直接给出正确答案的选项。\n\n"
            "问题\nA. 甲\nB. 乙\n答案：",
            f" {letter}",
        )
        for letter in "AB"
    ]
    assert texts(tokenizer, build(tokenizer, BENCHMARKS["mmlu"], "letter", ENGLISH))[3] == (
        "The following are multiple choice questions (with answers) about anatomy.\n\n"
        "Where is it?\nA. here\nB. there\nC. no\nD. yes\nAnswer:",
        " D",
    )
    passage = Question("0", "c3-m", "问题", ("甲", "乙"), 0, "一段话。")
    [(prompt, _), _] = texts(tokenizer, build(tokenizer, BENCHMARKS["c3"], "letter", passage))
    assert prompt.endswith("答案。\n\n一段话。\n问题\nA. 甲\nB. 乙\n答案：")


def test_answer_style_divides_by_bytes(tokenizer: Tokenizer) -> None:
    prompt = build(tokenizer, BENCHMARKS["ceval"], "answer", QUESTION, EXAMPLE)
    head = "以下是中国关于逻辑学的单项选择题，请选出其中的正确答案。\n\n"
    text = head + "长江最后流入____。\n答案： 东海\n\n泰山在哪里？\n答案："
    expected = [(text, f" {option}") for option in QUESTION.options]
    assert texts(tokenizer, prompt) == expected
    assert prompt.divisors == (9, 6, 6, 6)
    assert choose(prompt, [-8.0, -6.0, -6.0, -7.0]) == 0
    assert choose(prompt, [-9.5, -6.0, -6.0, -7.0]) == 1  # a tie: the first


def test_examples_that_do_not_fit_are_dropped(tokenizer: Tokenizer) -> None:
    full = build(tokenizer, BENCHMARKS["ceval"], "letter", QUESTION, *[EXAMPLE] * 3)
    longest = max(len(row.tokens) for row in full.rows) - 1
    same = build(
        tokenizer, BENCHMARKS["ceval"], "letter", QUESTION, *[EXAMPLE] * 3, context=longest
    )
    less = build(
        tokenizer, BENCHMARKS["ceval"], "letter", QUESTION, *[EXAMPLE] * 3, context=longest - 1
    )
    assert (full.shots, same.shots, less.shots) == (3, 3, 2)
    assert not less.truncated


@pytest.mark.parametrize("style", ["chat", "letter", "answer"])
def test_a_question_that_does_not_fit_is_truncated_at_its_start(
    tokenizer: Tokenizer, varied: Transformer, style: Style
) -> None:
    complete = build(tokenizer, BENCHMARKS["ceval"], style, QUESTION)
    prompt = build(tokenizer, BENCHMARKS["ceval"], style, QUESTION, context=12)
    assert prompt.truncated
    for row, full in zip(prompt.rows, complete.rows, strict=True):
        assert len(row.tokens) <= 13
        assert row.tokens == full.tokens[-len(row.tokens) :]
        assert row.tokens[row.start :] == full.tokens[full.start :]
    [(_, scores)] = EngineScorer(varied, tokenizer, 12).score([(None, prompt.rows)])
    assert isinstance(scores, list) and len(scores) == 4


def test_an_answer_longer_than_the_context_is_truncated(
    tokenizer: Tokenizer, varied: Transformer
) -> None:
    long = Question("0", "logic", "？", ("山" * 50, "东"), 1)
    prompt = build(tokenizer, BENCHMARKS["ceval"], "answer", long, context=12)
    assert prompt.truncated
    assert all(0 < row.start < len(row.tokens) <= 13 for row in prompt.rows)
    [(_, scores)] = EngineScorer(varied, tokenizer, 12).score([(None, prompt.rows)])
    assert isinstance(scores, list) and torch.isfinite(torch.tensor(scores)).all()


@pytest.mark.parametrize("name", CHATTING)
def test_chat_style_with_other_chat_templates(
    foreign_dir: Callable[[str], Path], name: str
) -> None:
    tokenizer = Tokenizer.load(foreign_dir(name))
    prompt = build(tokenizer, BENCHMARKS["ceval"], "chat", QUESTION)
    messages = [
        {"role": "system", "content": "开始回答问题"},
        {"role": "user", "content": " 泰山在哪里？ 。选择 A: 山东省, B: 四川, C: 青海, D: 北京"},
    ][name == "llama2" :]  # its template rejects system messages
    ids, _ = encode_chat(tokenizer, messages, add_generation_prompt=True)
    for row, letter in zip(prompt.rows, "ABCD", strict=True):
        assert list(row.tokens[: row.start]) == ids
        assert tokenizer.decode(row.tokens[row.start :]).strip() == letter
