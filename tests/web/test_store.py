import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from minimind.data.invalid import InvalidRecords
from minimind.data.read import read_records
from minimind.web.store import Answer, Conversation, Store, Turn
from tests.support.reads import opens


def talk() -> Conversation:
    turns = [
        Turn(
            "长江有多长？", [Answer("a", "六千多公里。", 5, 0.5, "stop"), Answer("b", "不知道。")]
        ),
        Turn("没有回答的", [Answer("a", error="gone")]),
        Turn("它流入哪里？", [Answer("a", "东海。")]),
    ]
    return Conversation(system="你是向导", models=["a", "b"], settings={"seed": 3}, turns=turns)


def test_save_and_load(tmp_path: Path) -> None:
    store, said = Store(tmp_path / "new"), talk()
    assert store.ids() == []
    store.save(said)
    assert store.load(said.id) == said
    other = Conversation(turns=[Turn("半个字符 \ud83d")])
    store.save(other)
    assert store.ids() == [other.id, said.id]  # most recent first
    assert [store.title(id) for id in store.ids()] == ["半个字符 ?", said.title]
    said.turns[0].question = "它有多宽？"
    store.save(said)
    assert store.ids() == [said.id, other.id]
    assert store.title(said.id) == "它有多宽？"
    store.delete(said.id)
    store.delete(said.id)
    assert store.load(said.id) is None


def test_listing_reads_no_file_and_each_title_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for number in range(500):
        store.save(Conversation(turns=[Turn(f"第{number}个")]))

    def first_page() -> list[str | None]:
        return [store.title(id) for id in store.ids()[:20]]

    assert opens(store.ids, tmp_path) == 0
    assert opens(first_page, tmp_path) == 20
    assert opens(first_page, tmp_path) == 0
    assert first_page() == [f"第{499 - place}个" for place in range(20)]
    changed = store.load(store.ids()[-1])
    assert changed
    store.save(changed)
    assert opens(first_page, tmp_path) == 1
    assert first_page()[:2] == ["第0个", "第499个"]


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_files_are_private(tmp_path: Path) -> None:
    store = Store(tmp_path / "new")
    store.save(talk())
    [path] = (tmp_path / "new").iterdir()
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_invalid_ids_are_ignored(tmp_path: Path) -> None:
    store, said = Store(tmp_path / "in"), talk()
    store.save(said)
    (tmp_path / f"{said.id}.json").write_bytes((tmp_path / "in" / f"{said.id}.json").read_bytes())
    for name in ("", "..", f"../{said.id}", f"{said.id}.json", said.id.upper(), "a" * 31):
        assert store.load(name) is None
        store.delete(name)
    assert (tmp_path / f"{said.id}.json").exists()


def kept_as_json() -> dict[str, Any]:
    return asdict(talk())


@pytest.mark.parametrize(
    "broken",
    [
        b"", b"{", b"{}", b"[]", b'"a"', b"5", b"null", b"\xff\xfe", b"[" * 100_000,
        b'{"id": "00000000000000000000000000000000", "updated": NaN}',
    ],
)  # fmt: skip
def test_an_invalid_file_is_quarantined_unchanged(tmp_path: Path, broken: bytes) -> None:
    store, said = Store(tmp_path), talk()
    store.save(said)
    id = "0" * 32
    for times in (1, 2):
        (tmp_path / f"{id}.json").write_bytes(broken)
        assert store.load(id) is None
        assert store.title(id) is None
        assert store.ids() == [said.id]
        assert [path.read_bytes() for path in store.quarantined()] == [broken] * times
    assert not (tmp_path / f"{id}.json").exists()
    store.save(Conversation(id=id))  # the id is free again
    assert store.load(id)


@pytest.mark.parametrize(
    "wrong",
    [
        {"id": "../../evil"}, {"id": "0" * 32}, {"id": 5}, {"updated": "now"}, {"updated": None},
        {"system": 5}, {"models": "tiny"}, {"models": [5]}, {"settings": []},
        {"settings": {"temperature": "hot"}}, {"settings": {"seed": True}}, {"more": 1},
        {"turns": 5}, {"turns": [5]}, {"turns": [{"question": "a"}, {"question": 5}]},
        {"turns": [{"question": "a", "id": "x"}, {"question": "b", "id": "x"}]},
        {"turns": [{"question": "a", "answers": {}}]},
        {"turns": [{"question": "a", "answers": [{"model": "m", "text": 5}]}]},
        {"turns": [{"question": "a", "answers": [{"model": "m", "tokens": "5"}]}]},
        {"turns": [{"question": "a", "answers": [{"model": "m", "more": 5}]}]},
    ],
)  # fmt: skip
def test_fields_of_the_wrong_type_are_rejected(tmp_path: Path, wrong: dict[str, Any]) -> None:
    store, kept = Store(tmp_path), kept_as_json()
    path = tmp_path / f"{kept['id']}.json"
    path.write_text(json.dumps(kept))
    assert store.load(kept["id"])
    path.write_text(json.dumps(kept | wrong))
    assert store.load(kept["id"]) is None
    [quarantined] = store.quarantined()
    assert json.loads(quarantined.read_text()) == kept | wrong
    assert quarantined.name.startswith(kept["id"])


def test_each_model_sees_its_own_answers() -> None:
    said = talk()
    first = said.messages(2, 0)
    assert [message["role"] for message in first] == ["system", "user", "assistant", "user"]
    assert first[2]["content"] == "六千多公里。"
    assert said.messages(2, 1)[2]["content"] == "不知道。"
    assert said.messages(0, 0) == [
        {"role": "system", "content": "你是向导"},
        {"role": "user", "content": "长江有多长？"},
    ]


def test_the_export_is_readable_by_sft(tmp_path: Path) -> None:
    said = talk()
    path = tmp_path / "talk.jsonl"
    path.write_text(said.as_training_data(), encoding="utf-8")
    bad = InvalidRecords()
    first, second = read_records([path], invalid=bad)
    assert not bad.total
    # One conversation per model, with its own answers.
    end = {"role": "assistant", "content": "东海。"}
    assert first.messages == [*said.messages(2, 0), end]
    assert second.messages == [*said.messages(2, 1), end]
    assert {m["content"] for m in second.messages} >= {"不知道。", "东海。"}
    for turn in said.turns:
        del turn.answers[1:]
    assert len(said.as_training_data().splitlines()) == 1
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
