"""Ways of asking a question of multiple choice, and what a model's scores say of the answer.

chat     The letter's probability after the chat prompt, the way MiniMind v1 scored C-Eval, its
         words included: the system message 开始回答问题, then the question and
         "。选择 A: …, B: …, C: …, D: …". Exams in English have the same in English.
letter   The letter after a plain prompt with solved examples, as lm-eval asks C-Eval, CMMLU and
         MMLU: the same text to the character.
answer   After the same plain prompt without the options, the whole answer's likelihood, a UTF-8
         byte: what it is measured in does not depend on the tokenizer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from minimind.errors import TokenizerError
from minimind.evaluation.benchmarks import LETTERS, Benchmark, Question, subject_info
from minimind.evaluation.encoding import PromptEncoder
from minimind.evaluation.scoring import Row

Style = Literal["chat", "letter", "answer"]

_HEADS = {
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
class Asked:
    """A question as rows to score: one an option.

    sizes: what each score is divided by. shots: examples that fitted. cut: whether even the
    question was too long, so that its beginning is missing.
    """

    rows: tuple[Row, ...]
    sizes: tuple[int, ...]
    shots: int = 0
    cut: bool = False


class PromptBuilder:
    """Writes prompts of one style for one exam. context: the most tokens that a model reads."""

    def __init__(
        self, words: PromptEncoder, exam: Benchmark, style: Style, shots: int, context: int
    ) -> None:
        self._words, self._exam, self._style = words, exam, style
        self._shots, self._context = shots, context
        self._letters: dict[str, tuple[int, ...]] = {}  # of the chat prompt's answers

    def ask(self, question: Question, examples: Sequence[Question]) -> Asked:
        """Rows for one question; of the examples as many of the first as are wanted and fit."""
        if self._style == "chat":
            return self._chat(question)
        most = min(self._shots, len(examples))
        for shots in range(most, -1, -1):
            asked = self._plain(question, examples[:shots])
            if max(len(row.tokens) for row in asked.rows) <= self._context + 1:
                return asked
        return self._cut(asked)

    def _chat(self, question: Question) -> Asked:
        language = self._language(question)
        options = ", ".join(
            f"{letter}: {option}" for letter, option in zip(LETTERS, question.options, strict=False)
        )
        passage = question.passage and question.passage + "\n"
        said = f"{passage}{question.question}{_CHOOSE[language]}{options}"
        messages = [{"role": "user", "content": said}]
        system = {"role": "system", "content": _SYSTEM[language]}
        try:
            prompt = self._words.prompt([system, *messages])
        except TokenizerError:  # some formats have no place for a system message
            prompt = self._words.prompt(messages)
        ends = [self._letter(letter) for letter in LETTERS[: len(question.options)]]
        rows = tuple(Row((*prompt, *end), len(prompt)) for end in ends)
        asked = Asked(rows, (1,) * len(rows))
        fits = max(len(row.tokens) for row in rows) <= self._context + 1
        return asked if fits else self._cut(asked)

    def _letter(self, letter: str) -> tuple[int, ...]:
        if letter not in self._letters:
            self._letters[letter] = tuple(self._words.answer(letter))
        return self._letters[letter]

    def _plain(self, question: Question, examples: Sequence[Question]) -> Asked:
        parts = [self._head(question)]
        parts += [f"{self._block(one)} {self._ends(one)[one.answer]}\n\n" for one in examples]
        prompt = "".join(parts) + self._block(question)
        ends = self._ends(question)
        start = self._words.text_start
        # An end is encoded as it stands after the prompt and taken from there, as lm-eval does.
        [said, *whole] = self._words.encode_batch([prompt, *(f"{prompt} {e}" for e in ends)])
        length = len(start) + len(said)
        rows = tuple(Row((*start, *said, *ids[len(said) :]), length) for ids in whole)
        by_bytes = self._style == "answer"
        sizes = tuple(len(end.encode()) if by_bytes else 1 for end in ends)
        return Asked(rows, sizes, len(examples))

    def _ends(self, question: Question) -> list[str]:
        if self._style == "answer":
            return list(question.options)
        return list(LETTERS[: len(question.options)])

    def _head(self, question: Question) -> str:
        if self._exam.name in _HEADS:
            return _HEADS[self._exam.name].format(
                subject_info(self._exam.name, question.subject).name
            )
        return _HEADS[self._language(question)]

    def _block(self, question: Question) -> str:
        """The question, up to where its answer goes."""
        lines = [question.passage] if question.passage else []
        lines.append(question.question.strip())
        if self._style == "letter":
            pairs = zip(LETTERS, question.options, strict=False)
            lines += [f"{letter}. {option}" for letter, option in pairs]
        return "\n".join([*lines, _ANSWER[self._language(question)]])

    def _language(self, question: Question) -> str:
        if self._exam.language:
            return self._exam.language
        return "zh" if any("\u4e00" <= c <= "\u9fff" for c in question.as_text()) else "en"

    def _cut(self, asked: Asked) -> Asked:
        """The ends of the rows, which hold what is asked; all cut at the same place."""
        most = self._context + 1
        over = max(len(row.tokens) for row in asked.rows) - most
        over = min(over, min(row.start for row in asked.rows) - 1)
        rows = tuple(
            Row(row.tokens[over:][:most], min(row.start - over, most - 1)) for row in asked.rows
        )
        return Asked(rows, asked.sizes, asked.shots, cut=True)


def choose(asked: Asked, scores: Sequence[float]) -> int:
    """The place of the likeliest option; of several, the first."""
    weighed = [score / size for score, size in zip(scores, asked.sizes, strict=True)]
    return max(range(len(weighed)), key=weighed.__getitem__)
