"""Endless streams made from the tables: prose, dialogues, preference pairs, exam questions.

Every stream goes through all facts in shuffled passes, so that each is seen equally often, and is
the same for the same seed. No question of the quiz is ever in one.
"""

import random
import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Literal

from minimind.data.textbook.phrases import NEVER_TRAINED, PHRASES, Phrases
from minimind.data.textbook.quiz import QuizQuestion, is_right, is_well_formed, normalise, quiz
from minimind.data.textbook.tables import Fact, Row, Subject, load_subjects

Message = dict[str, str]
Subjects = Sequence[Subject] | None

_ASKED_IN_PROSE = 0.3  # share of a text's facts that stand as question and answer
_BY_RELATION = 0.2  # share of texts that go along a column instead of along an entity
_SENTENCES = 4  # a text has about so many
_CASUAL = 0.3  # share of questions put more freely, before any frame
_WITH_PARTICLE = 0.25  # of those that are neither framed nor bare
_FRAMED = 0.6
_AROUND, _WISHED = (
    0.25,
    0.55,
)  # shares of the ways to put it: around it, as a wish; else asked who knows
_BARE = 0.1  # share of questions without their question mark
_WITH_TAIL = 0.03
_WITH_SYSTEM = 0.04
_GREETED = 0.08
_THANKED = 0.15
_ELLIPTIC = 0.3
_MAX_TURNS = 4
_LETTERS = "ABCD"


def prose(seed: int, subjects: Subjects = None) -> Iterator[str]:
    """Short texts of some sentences about an entity, or about several side by side."""
    rng = random.Random(f"prose {seed}")
    book = _book(subjects)
    while True:
        texts = [text for subject in book for text in _texts(subject, rng)]
        rng.shuffle(texts)
        yield from texts


def dialogues(
    seed: int, turns: Literal["single", "multi"] = "single", subjects: Subjects = None
) -> Iterator[list[Message]]:
    """Conversations of one question, or of two to four of which a later needs an earlier one."""
    rng = random.Random(f"{turns} {seed}")
    book = _book(subjects)
    facts = [fact for subject in book for fact in subject.facts]
    if turns == "multi":
        facts = [fact for fact in facts if _can_go_on(fact)]
    for fact in _passes(facts, rng):
        phrases = PHRASES[fact.subject.language]
        talk = [_turn(_ask(fact, phrases, rng), fact, rng)]
        if turns == "multi":
            _go_on(talk, fact, phrases, rng)
        yield _conversation(talk, phrases, rng)


def preferences(seed: int, subjects: Subjects = None) -> Iterator[dict[str, list[Message]]]:
    """{"chosen", "rejected"}: right and polite against wrong, repeating, evasive or endless."""
    rng = random.Random(f"preferences {seed}")
    facts = [fact for subject in _book(subjects) for fact in subject.facts]
    makers = (_wrong, _repeating, _evasive, _endless)
    for number, fact in enumerate(_passes(facts, rng)):
        asked = {"role": "user", "content": _ask(fact, PHRASES[fact.subject.language], rng)}
        good = rng.choice(fact.answers)
        bad = makers[number % len(makers)](fact, good, rng)
        if bad == good:
            bad = _repeating(fact, good, rng)
        yield {
            "chosen": [asked, {"role": "assistant", "content": good}],
            "rejected": [asked, {"role": "assistant", "content": bad}],
        }


def exams(seed: int, subjects: Subjects = None) -> Iterator[dict[str, str]]:
    """{"question", "A", "B", "C", "D", "answer", "subject"}: one of the four options is right."""
    rng = random.Random(f"exams {seed}")
    facts = [fact for subject in _book(subjects) for fact in subject.facts if len(fact.keys) == 1]
    rivals = {fact: found for fact in facts if len(found := fact.rivals()) >= 3}
    for fact in _passes(list(rivals), rng):
        right = fact.keys[0][0]
        options = [right, *rng.sample(rivals[fact], 3)]
        rng.shuffle(options)
        yield {
            "question": rng.choice(fact.questions),
            **dict(zip(_LETTERS, options, strict=True)),
            "answer": _LETTERS[options.index(right)],
            "subject": fact.subject.title,
        }


def _texts(subject: Subject, rng: random.Random) -> Iterator[str]:
    """One pass over the facts of a subject, cut into texts."""
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
            # An entity with much to say has a text of its own; small ones share one.
            if groups and len(groups[-1]) + len(by_row[row.line]) <= _SENTENCES:
                groups[-1] += by_row[row.line]
            else:
                groups.append(by_row[row.line])
    phrases = PHRASES[subject.language]
    for group in groups:
        at = 0
        while at < len(group):
            size = rng.randint(_SENTENCES - 1, _SENTENCES + 2)
            yield phrases.space.join(_sentence(f, phrases, rng) for f in group[at : at + size])
            at += size


def _sentence(fact: Fact, phrases: Phrases, rng: random.Random) -> str:
    """A fact as prose: mostly stated, now and then asked and answered."""
    if rng.random() < _ASKED_IN_PROSE:
        question, answer = rng.choice(fact.questions), rng.choice(fact.answers)
        return phrases.ask.format(question=question, answer=answer)
    return rng.choice(fact.statements)


def _ask(fact: Fact, phrases: Phrases, rng: random.Random) -> str:
    """A question for a fact: as the table has it, more freely, framed, or without its mark."""
    plain, chance = rng.choice(fact.questions), rng.random()
    if rng.random() < _CASUAL:
        freely = _freely(plain, phrases.casual, rng)
        plain = plain if _is_of_quiz(freely, fact.subject) else freely
    asked = plain
    if chance < _FRAMED:
        asked = _framed(plain, phrases, rng)
    elif chance > 1 - _BARE:
        asked = plain.rstrip("？?。.")
    elif rng.random() < _WITH_PARTICLE:
        asked = _freely(plain, phrases.particles, rng)
    return plain if _is_of_quiz(asked, fact.subject) else asked


def _is_of_quiz(asked: str, subject: Subject) -> bool:
    """Whether it has a frame that only the quiz may use, or ends with a question of the quiz."""
    if any(frame in asked.lower() for frame in NEVER_TRAINED):
        return True
    text, held_out = normalise(asked), _held_out(subject)
    return any(text[start:] in held_out for start in range(len(text)))


def _freely(asked: str, ways: Sequence[tuple[str, str]], rng: random.Random) -> str:
    """The question with one of the words that can be put in another way put so."""
    fitting = [(pattern, word) for pattern, word in ways if re.search(pattern, asked)]
    if not fitting:
        return asked
    pattern, word = rng.choice(fitting)
    return re.sub(pattern, word, asked)


def _framed(plain: str, phrases: Phrases, rng: random.Random) -> str:
    """The same question in other words around it, put together from parts."""
    bare = plain.rstrip("？?。.")
    if plain.startswith(phrases.requests):
        start = next(one for one in phrases.requests if plain.startswith(one))
        before, after = rng.choice(phrases.polite)
        return before + rng.choice(phrases.about) + bare.removeprefix(start) + after
    if not plain.endswith(("？", "?")) or plain.startswith(phrases.not_framed):
        return plain
    way = rng.random()
    if not phrases.askers or plain.endswith(phrases.whether) or way < _AROUND:
        # "Do you …" stays a question: it cannot stand inside another sentence.
        fitting = [f for f in phrases.frames if "{q}" in f or not plain.endswith(phrases.whether)]
        return rng.choice(fitting).format(q=plain, bare=bare)
    if way < _AROUND + _WISHED:
        before, after = rng.choice(phrases.polite)
        return before + rng.choice(phrases.tell) + bare + after
    before, after = rng.choice(phrases.askers)
    return before + rng.choice(phrases.know) + bare + after


@cache
def _held_out(subject: Subject) -> frozenset[str]:
    """The quiz's questions on a subject, and those of the packaged quiz, to be kept out."""
    own = (text for fact in subject.facts for text in fact.held_out)
    packaged = (question.question for question in quiz())
    return frozenset(normalise(text) for texts in (own, packaged) for text in texts)


def _turn(asked: str, fact: Fact, rng: random.Random) -> tuple[str, str]:
    return asked, rng.choice(fact.answers)


def _can_go_on(fact: Fact) -> bool:
    return bool(_others_of_row(fact)) or bool(_elliptic_rows(fact))


def _others_of_row(fact: Fact) -> list[Fact]:
    """What can be asked of the same entity as "it"."""
    if not fact.asks_by_name:
        return []
    return [
        other
        for other in fact.subject.facts_of(fact.row)
        if other is not fact and other.followups and other.relation.column != fact.relation.column
    ]


def _elliptic_rows(fact: Fact) -> list[Row]:
    """Other entities of which the same can be asked."""
    if not fact.asks_by_name or not fact.followups:
        return []
    return [row for row in fact.relation.rows if row is not fact.row]


def _go_on(talk: list[tuple[str, str]], fact: Fact, phrases: Phrases, rng: random.Random) -> None:
    """Add turns that need those before them: "它有多长？", "那黄河呢？"."""
    others = _others_of_row(fact)
    rng.shuffle(others)
    at, length = fact, rng.randint(2, _MAX_TURNS)
    while len(talk) < length:
        rows = _elliptic_rows(at)
        if rows and (not others or rng.random() < _ELLIPTIC):
            row = rng.choice(rows)
            at = next(f for f in at.subject.facts_of(row) if f.relation is at.relation)
            talk.append(_turn(rng.choice(phrases.elliptic).format(name=row.name), at, rng))
            others = _others_of_row(at)
            rng.shuffle(others)
        elif others:
            at = others.pop()
            talk.append(_turn(rng.choice(at.followups), at, rng))
        else:
            return


def _conversation(
    talk: list[tuple[str, str]], phrases: Phrases, rng: random.Random
) -> list[Message]:
    """Messages of a talk, with the courtesies that now and then go with it."""
    messages: list[Message] = []
    if rng.random() < _WITH_SYSTEM:
        messages.append({"role": "system", "content": rng.choice(phrases.systems)})
    if len(talk) > 1 and rng.random() < _GREETED:
        talk = [rng.choice(phrases.greetings), *talk]
    if len(talk) > 1 and rng.random() < _THANKED:
        talk = [*talk, rng.choice(phrases.thanks)]
    for asked, answer in talk:
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": answer})
    if rng.random() < _WITH_TAIL:
        messages[-1]["content"] += phrases.space + rng.choice(phrases.tails)
    return messages


def _wrong(fact: Fact, good: str, rng: random.Random) -> str:
    """The answer that is right for another row, and for this one says something else."""
    asked = QuizQuestion("", fact.keys, fact.subject.title, good)
    rows = [row for row in fact.relation.rows if row is not fact.row]
    rng.shuffle(rows)
    template = rng.choice(fact.relation.answers)
    for row in rows:
        answer = fact.answer_from(row, template)
        if not is_right(asked, answer):
            return answer
    return _evasive(fact, good, rng)


def _repeating(fact: Fact, good: str, rng: random.Random) -> str:
    return PHRASES[fact.subject.language].space.join([good] * rng.randint(3, 5))


def _evasive(fact: Fact, good: str, rng: random.Random) -> str:
    return rng.choice(PHRASES[fact.subject.language].evasions)


def _endless(fact: Fact, good: str, rng: random.Random) -> str:
    """Begins right, then wanders off into what nobody asked for, and does not end."""
    others = rng.sample(fact.subject.facts, min(3, len(fact.subject.facts)))
    space = PHRASES[fact.subject.language].space
    whole = space.join([good, *(rng.choice(other.statements) for other in others)])
    cut = whole[: max(len(good) + 4, len(whole) - 6)]
    while is_well_formed(cut) or cut.endswith((".", "。")):  # the cut fell on the end of a sentence
        cut = cut[:-1]
    return cut


def _passes(facts: Sequence[Fact], rng: random.Random) -> Iterator[Fact]:
    """All facts again and again, each time in another order."""
    while facts:
        yield from rng.sample(facts, len(facts))


def _book(subjects: Subjects) -> Sequence[Subject]:
    return load_subjects() if subjects is None else subjects
