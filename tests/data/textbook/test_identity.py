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

VARIABLES = {"name": "小明", "author": "李雷"}
DIALOGUES = list(islice(identity(0), 6000))
QUESTIONS = {m["content"] for dialogue in DIALOGUES for m in dialogue if m["role"] == "user"}


def is_chinese(text: str) -> bool:
    return any("一" <= character <= "龥" for character in text)


def test_there_are_many_questions_in_two_languages() -> None:
    bare = {normalise(text) for text in QUESTIONS}
    chinese = [text for text in bare if is_chinese(text)]
    assert len(chinese) >= 300 and len(bare) - len(chinese) >= 150
    turns = Counter(len(dialogue) // 2 for dialogue in DIALOGUES)
    assert turns.keys() == {1, 2} and 0.15 < turns[2] / len(DIALOGUES) < 0.35


def test_held_out_questions_are_not_trained_on_even_inside_a_frame() -> None:
    held_out = {normalise(q.question) for q in held_out_identity()}
    assert len(held_out) == len(held_out_identity()) >= 30
    assert {q.language for q in held_out_identity()} == {"zh", "en"}
    assert {key for q in held_out_identity() for key in q.keys} == {"name", "author"}
    for text in map(normalise, QUESTIONS):
        assert not any(text.endswith(other) or other.endswith(text) for other in held_out), text


def test_answers_have_variables_and_the_language_of_the_question() -> None:
    answers = set()
    for dialogue in DIALOGUES:
        for question, answer in zip(dialogue[::2], dialogue[1::2], strict=True):
            assert (question["role"], answer["role"]) == ("user", "assistant")
            assert is_chinese(question["content"]) == is_chinese(answer["content"])
            assert variables_in(answer["content"]) and not variables_in(question["content"])
            answers.add(answer["content"])
    assert len(answers) >= 30


def test_dialogues_depend_only_on_the_seed() -> None:
    assert list(islice(identity(0), 100)) == DIALOGUES[:100]
    assert list(islice(identity(1), 100)) != DIALOGUES[:100]
    before = list(islice(dialogues(3), 20))
    next(identity(3))
    assert list(islice(dialogues(3), 20)) == before


def test_a_right_answer_contains_the_variables_of_the_question() -> None:
    by_topic = {(q.language, q.about): q for q in held_out_identity()}
    name, author = by_topic["zh", "name"], by_topic["en", "author"]
    assert name.is_right("我叫小明。", VARIABLES) and not name.is_right("我叫李雷。", VARIABLES)
    assert author.is_right("I was made by 李雷.", VARIABLES)
    assert not author.is_right("I was made by {{author}}.", VARIABLES)


def test_textbook_files_are_generated_by_name_and_reused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert textbook_file("a.jsonl", tmp_path, {}) == "a.jsonl"
    folder = tmp_path / "new" / "folder"
    path = Path(textbook_file("textbook:identity", folder, VARIABLES))
    assert len(path.read_text("utf-8").splitlines()) == 3000
    os.utime(path, (1, 1))
    assert textbook_file("textbook:identity", folder, VARIABLES) == str(path)
    assert path.stat().st_mtime == 1, "a valid file is not generated again"
    path.write_text("cut")
    textbook_file("textbook:identity", folder, VARIABLES)
    assert len(path.read_text("utf-8").splitlines()) == 3000
    assert sorted(file.name for file in folder.iterdir()) == [
        "textbook-identity.jsonl",
        "textbook-identity.jsonl.sha256",
    ]
    with monkeypatch.context() as patched:
        patched.setattr(textbook, "_dialogue_records", lambda *_: pytest.fail("generated again"))
        patched.setattr(textbook, "identity", lambda *_: pytest.fail("generated again"))
        textbook_file("textbook:identity", folder, VARIABLES)
    os.utime(path, (1, 1))
    monkeypatch.setattr(textbook, "_version", lambda: "another version")
    textbook_file("textbook:identity", folder, VARIABLES)
    assert path.stat().st_mtime != 1
    monkeypatch.chdir(tmp_path)
    Path("textbook:retention").mkdir()
    assert textbook_file("textbook:retention", folder, VARIABLES) == "textbook:retention"
    with pytest.raises(DataError, match="it has identity, dialogues, retention"):
        textbook_file("textbook:nothing", folder, VARIABLES)
    with pytest.raises(ConfigError, match=r"set data\.variables\.author=…$"):
        textbook_file("textbook:identity", folder, {"name": "小明"})
