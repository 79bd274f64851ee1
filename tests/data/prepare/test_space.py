"""The estimate of disk space bounds what a preparation writes."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import zstandard

from minimind.data.prepare.settings import load_prepare_settings
from minimind.data.prepare.space import needed_bytes
from minimind.errors import ResourceError
from minimind.tokenizer import Tokenizer
from minimind.training.reporter import Reporter
from minimind.units import format_size
from tests.data.prepare.test_pipeline import SETTINGS, run
from tests.support.corpora import Corpus, write_texts


class _Measuring(Reporter):
    """Records the largest size of a folder after each task."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.largest = folder, 0

    def progress(self, done: int, total: int, note: str = "") -> None:
        size = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        self.largest = max(self.largest, size)


class _Usage(NamedTuple):
    free: int


@pytest.fixture
def compressed(tmp_path: Path) -> Path:
    corpus = Corpus()
    plain = write_texts(tmp_path / "a.jsonl", [corpus.document(600) for _ in range(800)])
    file = tmp_path / "a.jsonl.zst"
    file.write_bytes(zstandard.compress(plain.read_bytes(), 10))
    return file


def test_the_estimate_is_an_upper_bound_and_not_far_above(
    compressed: Path, tokenizer_dir: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    settings = load_prepare_settings("zh", SETTINGS)
    cases: list[tuple[Path, Tokenizer | None]] = [
        (compressed, tokenizer),
        (tmp_path / "a.jsonl", None),
    ]
    for file, loaded in cases:
        out = tmp_path / f"out{file.suffix}"
        measuring = _Measuring(out)
        run([file], out, reporter=measuring, tokenizer=tokenizer_dir if loaded else None)
        needed = needed_bytes([file], settings, loaded)
        assert 0.6 * needed < measuring.largest < needed


def test_a_full_disk_is_noticed_before_the_work(
    compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = needed_bytes([compressed], load_prepare_settings("zh", SETTINGS), None)

    def disk_usage(path: Any) -> _Usage:
        return _Usage(needed // 2)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    sizes = rf"needs about {format_size(needed)} of disk, and [\d.]+ [kM]B are free"
    with pytest.raises(ResourceError, match=sizes):
        run([compressed], tmp_path / "out")
    assert not (tmp_path / "out" / "work" / "read").exists()
    # What an interrupted preparation has written counts as free.
    (tmp_path / "out" / "work" / "read").mkdir(parents=True)
    (tmp_path / "out" / "work" / "read" / "00000-00009.jsonl.zst").write_bytes(bytes(needed))
    run([compressed], tmp_path / "out")
