"""What is wrong with the tables, as their format has it."""

from collections.abc import Iterator, Sequence

from minimind.data.textbook.phrases import NEVER_TRAINED
from minimind.data.textbook.quiz import fact_question, is_right, is_well_formed, normalise
from minimind.data.textbook.tables import Fact, Subject

_MINIMUM = {"statements": 3, "questions": 5, "held_out": 2, "answers": 2}


def lint(subjects: Sequence[Subject]) -> list[str]:
    """Every breach of the format, each as one line that names its file."""
    return [
        *(finding for subject in subjects for finding in _shape(subject)),
        *(finding for subject in subjects for finding in _answers(subject)),
        *_meanings(subjects),
        *_leaks(subjects),
    ]


def _shape(subject: Subject) -> Iterator[str]:
    """Counts of templates, frames that belong to the quiz, rows twice, cells never spoken of."""
    toml = subject.path.with_suffix(".toml").name
    for relation in subject.relations:
        where = f"{toml}: relation on {relation.column}"
        for name, least in _MINIMUM.items():
            if len(getattr(relation, name)) < least:
                yield f"{where}: {name} needs at least {least}"
        if len(relation.followups) == 1:
            yield f"{where}: followups needs none or at least 2"
        if not relation.rows:
            yield f"{where}: no row has all the cells that it uses"
    names = [row.name for row in subject.rows]
    for row in subject.rows:
        where = f"{subject.path.name}:{row.line}"
        if names.count(row.name) > 1:
            yield f"{where}: the name {row.name} is there more than once"
        for column in subject.fact_columns:
            spoken = any(
                row in relation.rows for relation in subject.relations if column == relation.column
            )
            if row.cells[column] and not spoken:
                yield f"{where}: no relation speaks of {column} of {row.name}"
    for fact in subject.facts:
        for text in (*fact.questions, *fact.followups):
            if text.lower().startswith(NEVER_TRAINED):
                yield f"{_where(fact)}: “{text}” is a frame that only the quiz may use"


def _answers(subject: Subject) -> Iterator[str]:
    """Every answer holds all keys and matches the keywords and is well formed."""
    for fact in subject.facts:
        question = fact_question(fact, "")
        for answer in fact.answers:
            if not is_right(question, answer):
                yield f"{_where(fact)}: “{answer}” is not right by the keys {fact.keys}"
            if not is_well_formed(answer):
                yield f"{_where(fact)}: “{answer}” is not a well-formed answer"


def _meanings(subjects: Sequence[Subject]) -> Iterator[str]:
    """One question, one answer: no question is asked for two things."""
    asked: dict[str, Fact] = {}
    for fact in _facts(subjects):
        context = normalise(fact.name)
        texts = [*fact.questions, *fact.held_out, *(f"{context} {f}" for f in fact.followups)]
        for text in dict.fromkeys(map(normalise, texts)):
            first = asked.setdefault(text, fact)
            if first.keys != fact.keys:
                yield (
                    f"{_where(fact)}: “{text}” asks for {fact.keys}, "
                    f"but for {first.keys} in {_where(first)}"
                )


def _leaks(subjects: Sequence[Subject]) -> Iterator[str]:
    """No question of the quiz is trained on, nor is a longer one that ends with it."""
    held_out = {normalise(text): fact for fact in _facts(subjects) for text in fact.held_out}
    for fact in _facts(subjects):
        for text in (*fact.questions, *fact.followups):
            asked = normalise(text)
            ends = (asked[start:] for start in range(len(asked)))
            for end in (end for end in ends if end in held_out):
                there = _where(held_out[end])
                yield f"{_where(fact)}: “{text}” trains on the held-out “{end}” of {there}"


def _facts(subjects: Sequence[Subject]) -> Iterator[Fact]:
    return (fact for subject in subjects for fact in subject.facts)


def _where(fact: Fact) -> str:
    """For example rivers.tsv:2 (length)."""
    return f"{fact.subject.path.name}:{fact.row.line} ({fact.relation.column})"
