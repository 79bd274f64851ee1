"""Prompts of multiple-choice questions, and the choice of the most likely option.

chat     The likelihood of the option's letter after the chat prompt, as MiniMind v1 scored C-Eval:
         the system message 开始回答问题, then the question and "。选择 A: …, B: …, C: …, D: …".
         English benchmarks use the same prompt in English.
letter   The likelihood of the letter after a plain prompt with solved examples, identical to
         lm-eval's prompts for C-Eval, CMMLU and MMLU.
answer   The likelihood of the full answer per UTF-8 byte, after the same plain prompt without the
         options. Normalization by bytes does not depend on the tokenizer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from minimind.errors import TokenizerError
from minimind.evaluation.benchmarks import LETTERS, Benchmark, Question, subject_info
from minimind.evaluation.encoding import PromptEncoder
from minimind.evaluation.scoring import Row

Style = Literal["chat", "letter", "answer"]

_DESCRIPTIONS = {
    "ceval": "以下是中国关于{}的单项选择题，请选出其中的正确答案。\n\n",
    "cmmlu": "以下是关于{}的单项选择题，请直接给出正确答案的选项。\n\n",
    "mmlu": "The following are multiple choice questions (with answers) about {}.\n\n",
    "zh": "以下是单项选择题，请选出其中的正确答案。\n\n",
    "en": "The following are multiple choice questions (with answers).\n\n",
}
_ANSWER = {"zh": "答案：", "en": "Answer:"}
_SYSTEM = {"zh": "开始回答问题", "en": "Answer the question"}
_CHOOSE = {"zh": "。选择 ", "en": " Choose "}


@dataclass(frozen=True)
class ChoicePrompt:
    """A question as rows to score, one row per option.

    divisors: the number by which the score of each row is divided. shots: the number of few-shot
    examples. truncated: True if the question exceeded the context even without examples, so that
    its beginning was dropped.
    """

    rows: tuple[Row, ...]
    divisors: tuple[int, ...]
    shots: int = 0
    truncated: bool = False


class PromptBuilder:
    """Builder of a benchmark's prompts in one style. context: the model's, in tokens."""

    def __init__(
        self,
        encoder: PromptEncoder,
        benchmark: Benchmark,
        style: Style,
        shots: int,
        context: int,
    ) -> None:
        self._encoder, self._benchmark, self._style = encoder, benchmark, style
        self._shots, self._max_length = shots, context + 1
        self._letter_ids: dict[str, tuple[int, ...]] = {}  # tokens of a letter after a chat prompt

    def build(self, question: Question, examples: Sequence[Question]) -> ChoicePrompt:
        """Return the prompt of a question, preceded by as many of the examples as fit."""
        if self._style == "chat":
            return self._chat_prompt(question)
        for shots in range(min(self._shots, len(examples)), -1, -1):
            prompt = self._plain_prompt(question, examples[:shots])
            if self._fits(prompt):
                return prompt
        return self._truncate(prompt)

    def _chat_prompt(self, question: Question) -> ChoicePrompt:
        language = self._language_of(question)
        options = ", ".join(
            f"{letter}: {option}" for letter, option in zip(LETTERS, question.options, strict=False)
        )
        passage = question.passage and question.passage + "\n"
        text = f"{passage}{question.question}{_CHOOSE[language]}{options}"
        messages = [{"role": "user", "content": text}]
        system = {"role": "system", "content": _SYSTEM[language]}
        try:
            ids = self._encoder.prompt([system, *messages])
        except TokenizerError:  # some chat templates reject system messages
            ids = self._encoder.prompt(messages)
        continuations = [self._letter_tokens(letter) for letter in LETTERS[: len(question.options)]]
        rows = tuple(Row((*ids, *continuation), len(ids)) for continuation in continuations)
        prompt = ChoicePrompt(rows, (1,) * len(rows))
        return prompt if self._fits(prompt) else self._truncate(prompt)

    def _letter_tokens(self, letter: str) -> tuple[int, ...]:
        if letter not in self._letter_ids:
            self._letter_ids[letter] = tuple(self._encoder.answer(letter))
        return self._letter_ids[letter]

    def _plain_prompt(self, question: Question, examples: Sequence[Question]) -> ChoicePrompt:
        parts = [self._description(question)]
        parts += [
            f"{self._format_question(example)} {self._continuations(example)[example.answer]}\n\n"
            for example in examples
        ]
        text = "".join(parts) + self._format_question(question)
        continuations = self._continuations(question)
        start = self._encoder.text_start
        # As in lm-eval, prompt and continuation are encoded together and split at the prompt's
        # length.
        [ids, *full_ids] = self._encoder.encode_batch(
            [text, *(f"{text} {c}" for c in continuations)]
        )
        length = len(start) + len(ids)
        rows = tuple(Row((*start, *ids, *full[len(ids) :]), length) for full in full_ids)
        by_bytes = self._style == "answer"
        divisors = tuple(len(c.encode()) if by_bytes else 1 for c in continuations)
        return ChoicePrompt(rows, divisors, len(examples))

    def _continuations(self, question: Question) -> list[str]:
        if self._style == "answer":
            return list(question.options)
        return list(LETTERS[: len(question.options)])

    def _description(self, question: Question) -> str:
        name = self._benchmark.name
        if name in _DESCRIPTIONS:
            return _DESCRIPTIONS[name].format(subject_info(name, question.subject).name)
        return _DESCRIPTIONS[self._language_of(question)]

    def _format_question(self, question: Question) -> str:
        """Format a question up to its answer, with its options in the style "letter"."""
        lines = [question.passage] if question.passage else []
        lines.append(question.question.strip())
        if self._style == "letter":
            pairs = zip(LETTERS, question.options, strict=False)
            lines += [f"{letter}. {option}" for letter, option in pairs]
        return "\n".join([*lines, _ANSWER[self._language_of(question)]])

    def _language_of(self, question: Question) -> str:
        if self._benchmark.language:
            return self._benchmark.language
        return "zh" if any("\u4e00" <= c <= "\u9fff" for c in question.as_text()) else "en"

    def _fits(self, prompt: ChoicePrompt) -> bool:
        return max(len(row.tokens) for row in prompt.rows) <= self._max_length

    def _truncate(self, prompt: ChoicePrompt) -> ChoicePrompt:
        """Drop the same number of tokens from the start of all rows, so that they fit."""
        excess = max(len(row.tokens) for row in prompt.rows) - self._max_length
        excess = min(excess, min(row.start for row in prompt.rows) - 1)
        rows = tuple(
            Row(
                row.tokens[excess:][: self._max_length],
                min(row.start - excess, self._max_length - 1),
            )
            for row in prompt.rows
        )
        return ChoicePrompt(rows, prompt.divisors, prompt.shots, truncated=True)


# --8<-- [start:choose]
def choose(prompt: ChoicePrompt, scores: Sequence[float]) -> int:
    """Return the index of the most likely option; the first one in case of a tie."""
    normalized = [score / divisor for score, divisor in zip(scores, prompt.divisors, strict=True)]
    return max(range(len(normalized)), key=normalized.__getitem__)


# --8<-- [end:choose]
