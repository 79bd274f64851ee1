import os
from pathlib import Path

import pytest

from minimind.data.read import BadLines, read_records
from minimind.web.store import Answer, Conversation, Store, Turn, data_folder


def talk() -> Conversation:
    turns = [
        Turn(
            "长江有多长？", [Answer("a", "六千多公里。", 5, 0.5, "stop"), Answer("b", "不知道。")]
        ),
        Turn("没有回答的", [Answer("a", error="gone")]),
        Turn("它流入哪里？", [Answer("a", "东海。")]),
    ]
    return Conversation(system="你是向导", models=["a", "b"], settings={"seed": 3}, turns=turns)


def test_what_is_kept_is_what_was_said(tmp_path: Path) -> None:
    store, said = Store(tmp_path / "new"), talk()
    assert store.all() == []
    store.save(said)
    assert store.load(said.id) == said
    other = Conversation(turns=[Turn("半个字符 \ud83d")])
    store.save(other)
    assert [found.id for found in store.all()] == [other.id, said.id]  # the last used first
    store.save(said)
    assert [found.id for found in store.all()] == [said.id, other.id]
    store.delete(said.id)
    store.delete(said.id)
    assert store.load(said.id) is None


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_nobody_else_can_read_it(tmp_path: Path) -> None:
    store = Store(tmp_path / "new")
    store.save(talk())
    [path] = (tmp_path / "new").iterdir()
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_names_that_lead_elsewhere_and_broken_files_are_nothing(tmp_path: Path) -> None:
    store, said = Store(tmp_path / "in"), talk()
    store.save(said)
    (tmp_path / f"{said.id}.json").write_bytes((tmp_path / "in" / f"{said.id}.json").read_bytes())
    for name in ("", "..", f"../{said.id}", f"{said.id}.json", said.id.upper(), "a" * 31):
        assert store.load(name) is None
        store.delete(name)
    assert (tmp_path / f"{said.id}.json").exists()
    for broken in ("", "{}", "[]", '{"turns": 5}', '{"turns": [], "more": 1}', '"a"', "5", "null"):
        (tmp_path / "in" / ("0" * 32 + ".json")).write_text(broken)
        assert store.load("0" * 32) is None
        assert [found.id for found in store.all()] == [said.id]


def test_each_side_hears_its_own_answers() -> None:
    said = talk()
    first = said.messages(2, 0)
    assert [message["role"] for message in first] == ["system", "user", "assistant", "user"]
    assert first[2]["content"] == "六千多公里。"
    assert said.messages(2, 1)[2]["content"] == "不知道。"
    assert said.messages(0, 0) == [
        {"role": "system", "content": "你是向导"},
        {"role": "user", "content": "长江有多长？"},
    ]


def test_what_is_exported_is_what_sft_reads(tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    path.write_text(talk().as_training_data(), encoding="utf-8")
    bad = BadLines()
    [record] = read_records([path], bad=bad)
    assert not bad.total
    assert record.messages == [*talk().messages(2, 0), {"role": "assistant", "content": "东海。"}]
    assert Conversation().as_training_data() == ""


def test_a_last_turn_without_an_answer_is_not_exported() -> None:
    said = talk()
    whole = said.as_training_data()
    said.turns.append(Turn("然后呢？", [Answer("a", error="gone")]))
    assert said.as_training_data() == whole
    said.turns[-1].answers = []
    assert said.as_training_data() == whole
    assert Conversation(system="s", turns=[Turn("?")]).as_training_data() == ""


def test_titles_are_short_and_on_one_line() -> None:
    assert Conversation(turns=[Turn("一\n二  三")]).title == "一 二 三"
    long = Conversation(turns=[Turn("长" * 100)]).title
    assert (len(long), long[-1]) == (40, "…")
    assert Conversation().title == ""


def test_the_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert data_folder() == tmp_path / "minimind"
    monkeypatch.delenv("XDG_DATA_HOME")
    assert data_folder() == Path.home() / ".local/share/minimind"
