"""Properties of the streams, on the packaged tables where they concern all facts."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice
from typing import Any

import pytest

from minimind.data.textbook import (
    QuizQuestion,
    Subject,
    dialogues,
    is_correct,
    is_well_formed,
    load_subjects,
    multiple_choice,
    preferences,
    prose,
    quiz,
)
from minimind.data.textbook.phrases import NEVER_TRAINED, PHRASES
from minimind.data.textbook.quiz import fact_question, normalise
from minimind.data.textbook.tables import Fact

STREAMS: dict[str, Callable[..., Iterator[Any]]] = {
    "prose": prose,
    "single": dialogues,
    "multi": lambda seed, subjects=None: dialogues(seed, "multi", subjects),
    "preferences": preferences,
    "multiple_choice": multiple_choice,
}
NUM_ITEMS = 20_000
SETS_OF_TURNS = [turns for one in PHRASES.values() for turns in (one.greetings, one.thanks)]
COURTESIES = {question for turns in SETS_OF_TURNS for question, _ in turns}
EVASIONS = {evasion for phrases in PHRASES.values() for evasion in phrases.evasions}


@cache
def items(stream: str, number: int = NUM_ITEMS) -> list[Any]:
    return list(islice(STREAMS[stream](11), number))


def questions_in(stream: str, item: Any) -> list[str]:
    """Return all questions in one item of a stream."""
    if stream == "prose":
        return re.findall(r"问：(.*?)答：|Question: (.*?) Answer: ", item)
    if stream == "multiple_choice":
        return [item["question"]]
    messages = item if isinstance(item, list) else [*item["chosen"], *item["rejected"]]
    return [message["content"] for message in messages if message["role"] == "user"]


@cache
def wordings(fact: Fact) -> set[str]:
    """Return the normalised questions of a fact, as in the tables and casually reworded."""
    casual = PHRASES[fact.subject.language].casual
    reworded = {re.sub(a, b, q) for a, b in casual for q in fact.questions}
    return {normalise(question) for question in {*fact.questions, *reworded}}


@pytest.fixture(scope="module")
def facts_by_answer() -> dict[str, list[Fact]]:
    facts_by_answer = defaultdict(list)
    for subject in load_subjects():
        for fact in subject.facts:
            for answer in fact.answers:
                facts_by_answer[answer].append(fact)
    return facts_by_answer


@pytest.mark.parametrize("stream", STREAMS)
def test_streams_depend_only_on_the_seed(stream: str) -> None:
    generate = STREAMS[stream]
    first, again, other = (list(islice(generate(seed), 300)) for seed in (1, 1, 2))
    assert first == again
    assert sum(a == b for a, b in zip(first, other, strict=True)) < 5


@pytest.mark.parametrize("stream", STREAMS)
def test_passes_of_a_stream_differ(stream: str, rivers: Subject) -> None:
    texts = [str(item) for item in islice(STREAMS[stream](3, subjects=[rivers]), 200)]
    assert texts[:100] != texts[100:]
    assert len(set(texts)) > 60


@pytest.mark.parametrize("stream", STREAMS)
def test_no_question_of_the_quiz_is_in_a_stream(stream: str) -> None:
    """Neither as a complete question nor inside a longer one."""
    held_out = defaultdict(list)
    for question in quiz():
        text = normalise(question.question)
        held_out[text[:4]].append(text)
    questions = {
        normalise("".join(question))
        for item in items(stream)
        for question in questions_in(stream, item)
    }
    assert len(questions) > 10_000
    leaks = [
        (text, leak)
        for text in questions
        for start in range(len(text))
        for leak in held_out.get(text[start : start + 4], ())
        if text.startswith(leak, start)
    ]
    assert leaks == []


@pytest.mark.parametrize("stream", ["single", "multi", "preferences"])
def test_frames_reserved_for_the_quiz_are_not_used(stream: str) -> None:
    questions = (question for item in items(stream) for question in questions_in(stream, item))
    assert [q for q in questions if any(frame in q.lower() for frame in NEVER_TRAINED)] == []


def test_prose_is_statements_and_some_questions(rivers: Subject) -> None:
    statements = {text for fact in rivers.facts for text in fact.statements}
    questions = {
        f"问：{question}答：{answer}"
        for fact in rivers.facts
        for question in fact.questions
        for answer in fact.answers
    }
    counts = Counter(
        sentence
        for text in islice(prose(1, [rivers]), 400)
        for sentence in re.findall(r"问：[^？。]*[？。]答：[^。]*。|[^。]+。", text)
    )
    assert counts.keys() <= statements | questions
    assert statements <= counts.keys()
    share = sum(counts[text] for text in questions) / counts.total()
    assert 0.2 < share < 0.4


def test_prose_in_english_has_spaces_between_sentences() -> None:
    english = [subject for subject in load_subjects() if subject.language == "en"]
    assert english
    for text in islice(prose(1, english), 300):
        assert not re.search(r"[.?!][A-Z]", text), text


@pytest.mark.parametrize("turns", ["single", "multi"])
def test_each_fact_occurs_equally_often(turns: Any, rivers: Subject) -> None:
    passes = 12
    generated = list(islice(dialogues(5, turns, [rivers]), passes * len(rivers.facts)))
    first = [
        next(m for m in dialogue if m["role"] == "user" and m["content"] not in COURTESIES)
        for dialogue in generated
    ]
    about = Counter(
        (row.name, relation.column)
        for message in first
        for row in rivers.rows
        for relation in rivers.relations
        if row.name in message["content"]
        and (relation.column == "length")
        == bool(re.search("[长多]少|全长|多长|长度", message["content"]))
    )
    assert set(about.values()) == {passes} and len(about) == len(rivers.facts)


def test_questions_are_reworded(rivers: Subject) -> None:
    as_in_tables = {text for fact in rivers.facts for text in fact.questions}
    questions = {
        dialogue[-2]["content"] for dialogue in islice(dialogues(9, "single", [rivers]), 6_000)
    }
    assert {"长江注入哪儿？", "长江全长几公里？", "长江有多长", "长江有多长呀？"} <= questions
    assert len(questions) > 20 * len(as_in_tables)


def test_every_rewording_matches_and_keeps_the_entity() -> None:
    facts = [fact for subject in load_subjects() for fact in subject.facts]
    marks = str.maketrans("", "", "“”《》")
    bare = {fact: fact.name.translate(marks) for fact in facts}
    for language, phrases in PHRASES.items():
        questions = [(f, q) for f in facts if f.subject.language == language for q in f.questions]
        for pattern, word in (*phrases.casual, *phrases.particles):
            replaced = ((f, *re.subn(pattern, word, q)) for f, q in questions)
            reworded = [(fact, text) for fact, text, count in replaced if count]
            assert reworded, pattern
            for fact, text in reworded:
                if fact.asks_by_name and not bare[fact][0].isdigit():  # 1公里 becomes 一公里
                    assert bare[fact] in text.translate(marks), (fact.name, text)


@pytest.mark.parametrize("turns", ["single", "multi"])
def test_roles_alternate_and_a_system_message_may_only_be_first(turns: str) -> None:
    for dialogue in items(turns):
        roles = [message["role"] for message in dialogue]
        if roles[0] == "system":
            del roles[0]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(message["content"].strip() for message in dialogue)
        assert len(roles) == 2 if turns == "single" else 4 <= len(roles) <= 12


def test_later_turns_need_the_context(rivers: Subject) -> None:
    names = [row.name for row in rivers.rows]
    followups = {text for fact in rivers.facts for text in fact.followups}
    counts: Counter[str] = Counter()
    for dialogue in islice(dialogues(2, "multi", [rivers]), 500):
        texts = [m["content"] for m in dialogue if m["role"] != "system"]
        turns = [
            turn for turn in zip(texts[::2], texts[1::2], strict=True) if turn[0] not in COURTESIES
        ]
        about = [name for name in names if name in turns[0][0]]
        assert len(about) == 1, "the first question names the entity"
        column = next(f.relation for f in rivers.facts if turns[0][1].startswith(f.answers))
        for question, answer in turns[1:]:
            if question in followups:
                counts["it"] += 1
                column = next(f.relation for f in rivers.facts if question in f.followups)
            else:
                counts["another"] += 1
                about = [name for name in names if question in (f"那{name}呢？", f"{name}呢？")]
                assert len(about) == 1, f"“{question}” does not need the context"
            (fact,) = (f for f in rivers.facts if f.name == about[0] and f.relation is column)
            assert answer.startswith(fact.answers), f"{question} {answer}"
    assert counts["it"] > 200 and counts["another"] > 200


def test_later_turns_of_the_packaged_tables_need_the_context() -> None:
    facts = [fact for subject in load_subjects() for fact in subject.facts]
    assert [f for fact in facts for f in fact.followups if fact.name in f] == []
    standalone = {normalise(text) for fact in facts for text in fact.questions}
    elliptic = {
        frame.format(name=fact.name)
        for fact in facts
        for frame in PHRASES[fact.subject.language].elliptic
    }
    dependent = elliptic | {text for fact in facts for text in fact.followups}
    assert not {normalise(text) for text in dependent} & standalone
    for dialogue in items("multi"):
        questions = [q for q in questions_in("multi", dialogue) if q not in COURTESIES]
        assert len(questions) >= 2
        assert set(questions[1:]) <= dependent


def test_only_the_chosen_side_of_a_pair_is_right(
    facts_by_answer: dict[str, list[Fact]],
) -> None:
    marked: dict[Fact, QuizQuestion] = {}
    kinds: Counter[str] = Counter()
    for pair in items("preferences", 6_000):
        prompt, chosen = pair["chosen"]
        assert pair["rejected"][0] == prompt and prompt["role"] == "user"
        rejected = pair["rejected"][1]["content"]
        candidates = facts_by_answer[chosen["content"]]
        text = normalise(prompt["content"])
        about = [
            fact for fact in candidates if any(question in text for question in wordings(fact))
        ]
        for fact in about or candidates[:1]:
            question = marked.setdefault(fact, fact_question(fact, ""))
            assert is_correct(question, chosen["content"]) and is_well_formed(chosen["content"])
            assert not (is_correct(question, rejected) and is_well_formed(rejected)), pair
        if rejected in EVASIONS:
            kinds["evasive"] += 1
        elif rejected.count(chosen["content"]) >= 3:
            kinds["repetitive"] += 1
        elif rejected.startswith(chosen["content"]):
            kinds["endless"] += 1
            assert not rejected.endswith(("。", "."))
        else:
            kinds["wrong"] += 1
            assert is_well_formed(rejected)
    assert len(marked) > 2_000
    assert min(kinds[kind] for kind in ("evasive", "repetitive", "endless", "wrong")) > 1_200


def test_a_multiple_choice_question_has_one_right_option(
    facts_by_answer: dict[str, list[Fact]],
) -> None:
    right_for = defaultdict(set)
    for facts in facts_by_answer.values():
        for fact in facts:
            for text in fact.questions:
                right_for[fact.subject.title, text] |= {key for keys in fact.keys for key in keys}
    positions: Counter[str] = Counter()
    for item in items("multiple_choice"):
        options = {letter: item[letter] for letter in "ABCD"}
        assert len(set(options.values())) == 4
        right = right_for[item["subject"], item["question"]]
        assert [letter for letter, text in options.items() if text in right] == [item["answer"]]
        positions[item["answer"]] += 1
    assert all(0.23 < positions[letter] / NUM_ITEMS < 0.27 for letter in "ABCD")


def test_the_quiz_of_custom_subjects_is_not_in_their_streams(rivers: Subject) -> None:
    held_out = {normalise(text) for fact in rivers.facts for text in fact.held_out}
    questions = {
        normalise(question)
        for dialogue in islice(dialogues(1, "single", [rivers]), 1_000)
        for question in questions_in("single", dialogue)
    }
    assert len(questions) > 200
    assert not questions & held_out
