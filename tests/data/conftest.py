from pathlib import Path

import pytest

from tests.support.token_stores import CHATS, TEXTS, write_lines


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    records: list[dict[str, object]] = [
        {"history": turns[:-1], "q": turns[-1][0], "a": turns[-1][1]} for turns in CHATS
    ]
    return write_lines(tmp_path / "chats.jsonl", records)


@pytest.fixture
def store_folder(tmp_path: Path) -> Path:
    return tmp_path / "stores"
