"""Infinite streams generated from the tables: prose, dialogues, preference pairs, multiple choice.

Every stream goes through all facts in shuffled passes, so that each fact occurs equally often. It
is a pure function of the seed. No question of the quiz occurs in a stream.
"""

import random
import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Literal

from minimind.data.textbook.phrases import NEVER_TRAINED, PHRASES, Phrases
from minimind.data.textbook.quiz import QuizQuestion, is_correct, is_well_formed, normalise, quiz
from minimind.data.textbook.tables import Fact, Row, Subject, load_subjects

Message = dict[str, str]
Subjects = Sequence[Subject] | None  # None: the packaged ones

# Probabilities unless noted otherwise.
_QUESTION_IN_PROSE = 0.3  # a fact in prose is rendered as question and answer
_BY_RELATION = 0.2  # prose about one column of a subject instead of one entity
_SENTENCES = 4  # typical number of sentences of a text
_CASUAL = 0.3  # a question is reworded casually, before any framing
_WITH_PARTICLE = 0.25  # a question without frame, with its mark, gets a final particle
_FRAMED = 0.6  # a question gets a frame
_FRAME, _REQUEST = 0.25, 0.55  # kinds of frame: fixed phrase, request; else "do you know"
_BARE = 0.1  # a question loses its question mark
_WITH_TAIL = 0.03
_WITH_SYSTEM = 0.04
_WITH_GREETING = 0.08
_WITH_THANKS = 0.15
_ELLIPTIC = 0.3  # a follow-up asks for the same attribute of another entity
_MAX_TURNS = 4
_LETTERS = "ABCD"


def prose(seed: int, subjects: Subjects = None) -> Iterator[str]:
    """Yield short texts of a few sentences about one entity, or about several."""
    rng = random.Random(f"prose {seed}")
    subjects = _or_packaged(subjects)
    while True:
        texts = [text for subject in subjects for text in _texts(subject, rng)]
        rng.shuffle(texts)
        yield from texts


def dialogues(
    seed: int, turns: Literal["single", "multi"] = "single", subjects: Subjects = None
) -> Iterator[list[Message]]:
    """Yield dialogues of one question, or of two to four that depend on earlier ones."""
    rng = random.Random(f"{turns} {seed}")
    facts = [fact for subject in _or_packaged(subjects) for fact in subject.facts]
    if turns == "multi":
        facts = [fact for fact in facts if _other_facts(fact) or _other_rows(fact)]
    for fact in _shuffled_passes(facts, rng):
        phrases = PHRASES[fact.subject.language]
        exchanges = [(_varied_question(fact, phrases, rng), rng.choice(fact.answers))]
        if turns == "multi":
            _add_followups(exchanges, fact, phrases, rng)
        yield _messages(exchanges, phrases, rng)


def preferences(seed: int, subjects: Subjects = None) -> Iterator[dict[str, list[Message]]]:
    """Yield {"chosen", "rejected"}; the latter is wrong, repetitive, evasive or rambling."""
    rng = random.Random(f"preferences {seed}")
    facts = [fact for subject in _or_packaged(subjects) for fact in subject.facts]
    corruptions = (_wrong, _repetitive, _evasive, _rambling)
    for number, fact in enumerate(_shuffled_passes(facts, rng)):
        question = {
            "role": "user",
            "content": _varied_question(fact, PHRASES[fact.subject.language], rng),
        }
        chosen = rng.choice(fact.answers)
        rejected = corruptions[number % len(corruptions)](fact, chosen, rng)
        if rejected == chosen:
            rejected = _repetitive(fact, chosen, rng)
        yield {
            "chosen": [question, {"role": "assistant", "content": chosen}],
            "rejected": [question, {"role": "assistant", "content": rejected}],
        }


def multiple_choice(seed: int, subjects: Subjects = None) -> Iterator[dict[str, str]]:
    """Yield {"question", "A", "B", "C", "D", "answer", "subject"}, with one right option."""
    rng = random.Random(f"exams {seed}")  # part of the seed: do not rename
    facts = [
        fact for subject in _or_packaged(subjects) for fact in subject.facts if len(fact.keys) == 1
    ]
    distractors = {fact: values for fact in facts if len(values := fact.distractors()) >= 3}
    for fact in _shuffled_passes(list(distractors), rng):
        right = fact.keys[0][0]
        options = [right, *rng.sample(distractors[fact], 3)]
        rng.shuffle(options)
        yield {
            "question": rng.choice(fact.questions),
            **dict(zip(_LETTERS, options, strict=True)),
            "answer": _LETTERS[options.index(right)],
            "subject": fact.subject.title,
        }


def _or_packaged(subjects: Subjects) -> Sequence[Subject]:
    return load_subjects() if subjects is None else subjects


def _shuffled_passes(facts: Sequence[Fact], rng: random.Random) -> Iterator[Fact]:
    """Yield all facts repeatedly, in a new order in each pass."""
    while facts:
        yield from rng.sample(facts, len(facts))


# --- Prose


def _texts(subject: Subject, rng: random.Random) -> Iterator[str]:
    """Yield texts that contain each fact of a subject once."""
    rows, relations = list(subject.rows), list(subject.relations)
    rng.shuffle(rows)
    by_row = {row.line: list(subject.facts_of(row)) for row in rows}
    if rng.random() < _BY_RELATION and len(relations) > 1:
        facts = [f for r in relations for row in rows for f in by_row[row.line] if f.relation is r]
        groups = [facts]
    else:
        groups = []
        for row in rows:
            rng.shuffle(by_row[row.line])
            # Entities with few facts share a text.
            if groups and len(groups[-1]) + len(by_row[row.line]) <= _SENTENCES:
                groups[-1] += by_row[row.line]
            else:
                groups.append(by_row[row.line])
    phrases = PHRASES[subject.language]
    for group in groups:
        start = 0
        while start < len(group):
            end = start + rng.randint(_SENTENCES - 1, _SENTENCES + 2)
            yield phrases.space.join(_sentence(f, phrases, rng) for f in group[start:end])
            start = end


def _sentence(fact: Fact, phrases: Phrases, rng: random.Random) -> str:
    """Render a fact as a statement, or as a question with its answer."""
    if rng.random() < _QUESTION_IN_PROSE:
        question, answer = rng.choice(fact.questions), rng.choice(fact.answers)
        return phrases.prose_question.format(question=question, answer=answer)
    return rng.choice(fact.statements)


# --- Questions


def _varied_question(fact: Fact, phrases: Phrases, rng: random.Random) -> str:
    """Return a question for a fact: as in the table, reworded, framed, or without its mark."""
    plain, draw = rng.choice(fact.questions), rng.random()
    if rng.random() < _CASUAL:
        casual = _reworded(plain, phrases.casual, rng)
        plain = plain if _is_held_out(casual, fact.subject) else casual
    question = plain
    if draw < _FRAMED:
        question = _framed(plain, phrases, rng)
    elif draw > 1 - _BARE:
        question = plain.rstrip("？?。.")
    elif rng.random() < _WITH_PARTICLE:
        question = _reworded(plain, phrases.particles, rng)
    return plain if _is_held_out(question, fact.subject) else question


def _is_held_out(question: str, subject: Subject) -> bool:
    """Return True if a question contains a frame of the quiz or ends with a quiz question."""
    lowered = question.lower()
    if any(frame in lowered for frame in NEVER_TRAINED):
        return True
    text, held_out = normalise(question), _held_out_questions(subject)
    return any(text[start:] in held_out for start in range(len(text)))


@cache
def _held_out_questions(subject: Subject) -> frozenset[str]:
    """Return the normalized questions of the subject's own quiz and of the packaged quiz."""
    own = (text for fact in subject.facts for text in fact.held_out)
    packaged = (question.question for question in quiz())
    return frozenset(normalise(text) for texts in (own, packaged) for text in texts)


def _reworded(question: str, rewordings: Sequence[tuple[str, str]], rng: random.Random) -> str:
    """Apply a random (pattern, replacement) pair that matches, if there is one."""
    matching = [(pattern, text) for pattern, text in rewordings if re.search(pattern, question)]
    if not matching:
        return question
    pattern, replacement = rng.choice(matching)
    return re.sub(pattern, replacement, question)


def _framed(plain: str, phrases: Phrases, rng: random.Random) -> str:
    """Return a question in a frame: a fixed phrase, a request, or "do you know"."""
    bare = plain.rstrip("？?。.")
    if plain.startswith(phrases.requests):
        start = next(request for request in phrases.requests if plain.startswith(request))
        before, after = rng.choice(phrases.polite)
        return before + rng.choice(phrases.request_replacements) + bare.removeprefix(start) + after
    if not plain.endswith(("？", "?")) or plain.startswith(phrases.not_framed):
        return plain
    draw = rng.random()
    if not phrases.askers or plain.endswith(phrases.yes_no_endings) or draw < _FRAME:
        # "Do you …" stays a question: it cannot be embedded in another sentence.
        fitting = [
            f for f in phrases.frames if "{q}" in f or not plain.endswith(phrases.yes_no_endings)
        ]
        return rng.choice(fitting).format(q=plain, bare=bare)
    if draw < _FRAME + _REQUEST:
        before, after = rng.choice(phrases.polite)
        return before + rng.choice(phrases.request_verbs) + bare + after
    before, after = rng.choice(phrases.askers)
    return before + rng.choice(phrases.knowing_verbs) + bare + after


# --- Dialogues


def _other_facts(fact: Fact) -> list[Fact]:
    """Return facts of the same entity that a follow-up can ask for with a pronoun."""
    if not fact.asks_by_name:
        return []
    return [
        other
        for other in fact.subject.facts_of(fact.row)
        if other is not fact and other.followups and other.relation.column != fact.relation.column
    ]


def _other_rows(fact: Fact) -> list[Row]:
    """Return other entities for which a follow-up can ask for the same attribute."""
    if not fact.asks_by_name or not fact.followups:
        return []
    return [row for row in fact.relation.rows if row is not fact.row]


def _add_followups(
    exchanges: list[tuple[str, str]], fact: Fact, phrases: Phrases, rng: random.Random
) -> None:
    """Append turns that need the context: "它有多长？" (it), "那黄河呢？" (another entity)."""
    others = _other_facts(fact)
    rng.shuffle(others)
    current, length = fact, rng.randint(2, _MAX_TURNS)
    while len(exchanges) < length:
        rows = _other_rows(current)
        if rows and (not others or rng.random() < _ELLIPTIC):
            row = rng.choice(rows)
            relation = current.relation
            current = next(f for f in current.subject.facts_of(row) if f.relation is relation)
            question = rng.choice(phrases.elliptic).format(name=row.name)
            exchanges.append((question, rng.choice(current.answers)))
            others = _other_facts(current)
            rng.shuffle(others)
        elif others:
            current = others.pop()
            question = rng.choice(current.followups)
            exchanges.append((question, rng.choice(current.answers)))
        else:
            return


def _messages(
    exchanges: list[tuple[str, str]], phrases: Phrases, rng: random.Random
) -> list[Message]:
    """Return the messages of a dialogue, sometimes with system prompt, greeting, thanks, tail."""
    messages: list[Message] = []
    if rng.random() < _WITH_SYSTEM:
        messages.append({"role": "system", "content": rng.choice(phrases.systems)})
    if len(exchanges) > 1 and rng.random() < _WITH_GREETING:
        exchanges = [rng.choice(phrases.greetings), *exchanges]
    if len(exchanges) > 1 and rng.random() < _WITH_THANKS:
        exchanges = [*exchanges, rng.choice(phrases.thanks)]
    for question, answer in exchanges:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    if rng.random() < _WITH_TAIL:
        messages[-1]["content"] += phrases.space + rng.choice(phrases.tails)
    return messages


# --- Rejected answers


def _wrong(fact: Fact, right: str, rng: random.Random) -> str:
    """Return a wrong answer, with the values of another row."""
    question = QuizQuestion("", fact.keys, fact.subject.title, right)
    rows = [row for row in fact.relation.rows if row is not fact.row]
    rng.shuffle(rows)
    template = rng.choice(fact.relation.answers)
    for row in rows:
        answer = fact.answer_from(row, template)
        if not is_correct(question, answer):
            return answer
    return _evasive(fact, right, rng)


def _repetitive(fact: Fact, right: str, rng: random.Random) -> str:
    return PHRASES[fact.subject.language].space.join([right] * rng.randint(3, 5))


def _evasive(fact: Fact, right: str, rng: random.Random) -> str:
    return rng.choice(PHRASES[fact.subject.language].evasions)


def _rambling(fact: Fact, right: str, rng: random.Random) -> str:
    """Continue a right answer with unrelated statements, and stop in the middle of a sentence."""
    others = rng.sample(fact.subject.facts, min(3, len(fact.subject.facts)))
    space = PHRASES[fact.subject.language].space
    complete = space.join([right, *(rng.choice(other.statements) for other in others)])
    truncated = complete[: max(len(right) + 4, len(complete) - 6)]
    while is_well_formed(truncated) or truncated.endswith((".", "。")):
        truncated = truncated[:-1]
    return truncated
