"""Checks of the tables: format, consistency of answers, no held-out question in training data."""

from collections.abc import Iterator, Sequence

from minimind.data.textbook.phrases import NEVER_TRAINED
from minimind.data.textbook.quiz import fact_question, is_correct, is_well_formed, normalise
from minimind.data.textbook.tables import Fact, Subject

_MINIMUM = {"statements": 3, "questions": 5, "held_out": 2, "answers": 2}


def lint(subjects: Sequence[Subject]) -> list[str]:
    """Return all findings, each as one line that names its file."""
    return [
        *(finding for subject in subjects for finding in _check_format(subject)),
        *(finding for subject in subjects for finding in _check_answers(subject)),
        *_check_ambiguity(subjects),
        *_check_leaks(subjects),
    ]


def _check_format(subject: Subject) -> Iterator[str]:
    """Check the number of templates, frames reserved for the quiz, duplicate rows, unused cells."""
    toml = subject.path.with_suffix(".toml").name
    for relation in subject.relations:
        where = f"{toml}: relation on {relation.column}"
        for name, minimum in _MINIMUM.items():
            if len(getattr(relation, name)) < minimum:
                yield f"{where}: {name} needs at least {minimum}"
        if len(relation.followups) == 1:
            yield f"{where}: followups needs none or at least 2"
        if not relation.rows:
            yield f"{where}: no row has all the cells that its templates use"
    names = [row.name for row in subject.rows]
    for row in subject.rows:
        where = f"{subject.path.name}:{row.line}"
        if names.count(row.name) > 1:
            yield f"{where}: the name {row.name} occurs more than once"
        for column in subject.fact_columns:
            used = any(
                row in relation.rows for relation in subject.relations if column == relation.column
            )
            if row.cells[column] and not used:
                yield f"{where}: no relation uses {column} of {row.name}"
    for fact in subject.facts:
        for text in (*fact.questions, *fact.followups):
            if text.lower().startswith(NEVER_TRAINED):
                yield f"{_where(fact)}: “{text}” has a frame reserved for the quiz"


def _check_answers(subject: Subject) -> Iterator[str]:
    """Check that every answer matches its own keys and is well formed."""
    for fact in subject.facts:
        question = fact_question(fact, "")
        for answer in fact.answers:
            if not is_correct(question, answer):
                yield f"{_where(fact)}: “{answer}” does not match the keys {fact.keys}"
            if not is_well_formed(answer):
                yield f"{_where(fact)}: “{answer}” is not a well-formed answer"


def _check_ambiguity(subjects: Sequence[Subject]) -> Iterator[str]:
    """Check that no question has two different answers."""
    fact_of: dict[str, Fact] = {}
    for fact in _facts(subjects):
        context = normalise(fact.name)
        texts = [*fact.questions, *fact.held_out, *(f"{context} {f}" for f in fact.followups)]
        for text in dict.fromkeys(map(normalise, texts)):
            first = fact_of.setdefault(text, fact)
            if first.keys != fact.keys:
                yield (
                    f"{_where(fact)}: “{text}” asks for {fact.keys}, "
                    f"but for {first.keys} in {_where(first)}"
                )


def _check_leaks(subjects: Sequence[Subject]) -> Iterator[str]:
    """Check that no training question is, or ends with, a question of the quiz."""
    held_out = {normalise(text): fact for fact in _facts(subjects) for text in fact.held_out}
    for fact in _facts(subjects):
        for text in (*fact.questions, *fact.followups):
            question = normalise(text)
            suffixes = (question[start:] for start in range(len(question)))
            for suffix in (suffix for suffix in suffixes if suffix in held_out):
                source = _where(held_out[suffix])
                yield f"{_where(fact)}: “{text}” contains the held-out “{suffix}” of {source}"


def _facts(subjects: Sequence[Subject]) -> Iterator[Fact]:
    return (fact for subject in subjects for fact in subject.facts)


def _where(fact: Fact) -> str:
    """Return file, line and column of a fact, such as "rivers.tsv:2 (length)"."""
    return f"{fact.subject.path.name}:{fact.row.line} ({fact.relation.column})"
