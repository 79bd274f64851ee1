import os
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from minimind.data import textbook
from minimind.data.schemas import variables_in
from minimind.data.textbook import dialogues, held_out_identity, identity, textbook_file
from minimind.data.textbook.quiz import normalise
from minimind.errors import ConfigError, DataError

FILL = {"name": "小明", "author": "李雷"}
TALKS = list(islice(identity(0), 6000))
ASKED = {m["content"] for talk in TALKS for m in talk if m["role"] == "user"}


def is_chinese(text: str) -> bool:
    return any("一" <= character <= "龥" for character in text)


def test_there_are_many_ways_of_asking_in_two_languages() -> None:
    bare = {normalise(text) for text in ASKED}
    chinese = [text for text in bare if is_chinese(text)]
    assert len(chinese) >= 300 and len(bare) - len(chinese) >= 150
    turns = Counter(len(talk) // 2 for talk in TALKS)
    assert turns.keys() == {1, 2} and 0.15 < turns[2] / len(TALKS) < 0.35


def test_what_is_held_out_is_never_trained_on_and_no_frame_around_what_is() -> None:
    held_out = {normalise(one.question) for one in held_out_identity()}
    assert len(held_out) == len(held_out_identity()) >= 30
    assert {one.language for one in held_out_identity()} == {"zh", "en"}
    assert {key for one in held_out_identity() for key in one.keys} == {"name", "author"}
    for text in map(normalise, ASKED):
        assert not any(text.endswith(one) or one.endswith(text) for one in held_out), text


def test_answers_say_a_name_or_an_author_in_the_language_of_the_question() -> None:
    answers = set()
    for talk in TALKS:
        for asked, answer in zip(talk[::2], talk[1::2], strict=True):
            assert (asked["role"], answer["role"]) == ("user", "assistant")
            assert is_chinese(asked["content"]) == is_chinese(answer["content"])
            assert variables_in(answer["content"]) and not variables_in(asked["content"])
            answers.add(answer["content"])
    assert len(answers) >= 30


def test_the_same_seed_gives_the_same_dialogues_and_others_are_left_alone() -> None:
    assert list(islice(identity(0), 100)) == TALKS[:100]
    assert list(islice(identity(1), 100)) != TALKS[:100]
    before = list(islice(dialogues(3), 20))
    next(identity(3))
    assert list(islice(dialogues(3), 20)) == before


def test_a_right_answer_names_what_was_asked_for() -> None:
    by_topic = {(one.language, one.about): one for one in held_out_identity()}
    name, author = by_topic["zh", "name"], by_topic["en", "author"]
    assert name.is_right("我叫小明。", FILL) and not name.is_right("我叫李雷。", FILL)
    assert author.is_right("I was made by 李雷.", FILL)
    assert not author.is_right("I was made by {{author}}.", FILL)


def test_recipes_find_parts_of_the_textbook_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert textbook_file("a.jsonl", tmp_path, {}) == "a.jsonl"
    folder = tmp_path / "new" / "place"
    path = Path(textbook_file("textbook:identity", folder, FILL))
    assert len(path.read_text("utf-8").splitlines()) == 3000
    os.utime(path, (1, 1))
    assert textbook_file("textbook:identity", folder, FILL) == str(path)
    assert path.stat().st_mtime == 1, "what is right is not made again"
    path.write_text("cut")
    textbook_file("textbook:identity", folder, FILL)
    assert len(path.read_text("utf-8").splitlines()) == 3000
    assert sorted(file.name for file in folder.iterdir()) == [
        "textbook-identity.jsonl",
        "textbook-identity.jsonl.sha256",
    ]
    with monkeypatch.context() as patched:
        patched.setattr(textbook, "_talks", lambda *_: pytest.fail("made again"))
        patched.setattr(textbook, "identity", lambda *_: pytest.fail("made again"))
        textbook_file("textbook:identity", folder, FILL)
    os.utime(path, (1, 1))
    monkeypatch.setattr(textbook, "_version", lambda: "another version")
    textbook_file("textbook:identity", folder, FILL)
    assert path.stat().st_mtime != 1
    monkeypatch.chdir(tmp_path)
    Path("textbook:general").mkdir()
    assert textbook_file("textbook:general", folder, FILL) == "textbook:general"
    with pytest.raises(DataError, match="it has identity, dialogues, general"):
        textbook_file("textbook:nothing", folder, FILL)
    with pytest.raises(ConfigError, match=r"give data\.variables\.author=…$"):
        textbook_file("textbook:identity", folder, {"name": "小明"})
