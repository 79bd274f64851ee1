"""Progress within one input file reaches the main process."""

import threading
from pathlib import Path

import pytest

from minimind.data.prepare import progress
from minimind.data.prepare.progress import repeatedly, running_tasks
from minimind.data.prepare.settings import load_prepare_settings
from minimind.data.prepare.stages import read_file
from tests.support.corpora import Corpus, write_texts


def test_a_task_writes_how_far_it_has_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = Corpus()
    file = write_texts(tmp_path / "a.jsonl", [corpus.document(500) for _ in range(1500)])
    settings = load_prepare_settings("zh").model_dump()
    arguments = (file, 7, tmp_path / "read", tmp_path / "invalid" / "7.jsonl", settings)
    read_file(*arguments)
    assert running_tasks(tmp_path / "read", {"00007"}) == {}  # too fast for any progress
    monkeypatch.setattr(progress, "INTERVAL_S", 0.0)
    read_file(*arguments)
    assert running_tasks(tmp_path / "read", {"00007"}) == {"00007": file.stat().st_size}
    assert running_tasks(tmp_path / "read", {"00008"}) == {}
    (tmp_path / "read" / "00007.progress").write_text("{")
    assert running_tasks(tmp_path / "read", {"00007"}) == {}
    assert running_tasks(tmp_path / "none", {"00007"}) == {}


def test_progress_that_cannot_be_written_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "INTERVAL_S", 0.0)
    (tmp_path / "file").touch()
    written = progress.ProgressFile(tmp_path / "file" / "00001.progress")
    written.add(5)
    with pytest.raises(OSError):
        progress.write_json(tmp_path / "file" / "00001.progress", {})


def test_an_action_is_repeated_until_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "INTERVAL_S", 0.001)
    twice = threading.Event()
    calls: list[int] = []

    def act() -> None:
        calls.append(len(calls))
        if len(calls) == 2:
            twice.set()

    with repeatedly(act):
        assert twice.wait(60)
