"""Preparation of and into URLs gives the bytes of a preparation of local files."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from minimind.data.locations import UrlPath
from minimind.data.prepare.pipeline import prepare
from minimind.data.prepare.settings import load_prepare_settings
from minimind.data.store import open_store
from minimind.errors import DataError, UsageError
from minimind.tokenizer import Tokenizer
from minimind.training.reporter import Reporter
from tests.data.prepare.test_pipeline import QUESTION, SETTINGS, hashes, inputs, run

__all__ = ["inputs"]


class _Interrupting(Reporter):
    """Interrupts after every task."""

    def progress(self, done: int, total: int, note: str = "") -> None:
        raise KeyboardInterrupt


@pytest.fixture
def memory(inputs: list[Path]) -> Iterator[MemoryFileSystem]:
    """An object store in this process, with the inputs."""
    system = MemoryFileSystem()
    for file in inputs:
        system.pipe_file(f"/bucket/in/{file.name}", file.read_bytes())
    yield system
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def run_on_urls(*settings: str, **options: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {"workers": 1, "memory_bytes": 2_000_000_000}
    options = defaults | {"reporter": Reporter()} | options
    loaded = load_prepare_settings("zh", [*SETTINGS, *settings])
    return prepare(["memory://bucket/in"], UrlPath("memory://bucket/out"), loaded, **options)


def comparable(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest without the places and times of its input files."""
    inputs = [entry | {"path": "", "stamp": None} for entry in manifest["inputs"]]
    return manifest | {"inputs": inputs, "identity": manifest["identity"] | {"inputs": None}}


def test_interrupted_after_each_task_the_result_is_that_of_local_files(
    memory: MemoryFileSystem,
    inputs: list[Path],
    tokenizer_dir: Path,
    tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    options: dict[str, Any] = {"tokenizer": tokenizer_dir, "questions": {"exam/1": QUESTION}}
    local = run(inputs, tmp_path / "local", **options)
    while not memory.exists("/bucket/out/manifest.json"):
        with contextlib.suppress(KeyboardInterrupt):
            run_on_urls(reporter=_Interrupting(), **options)
    said: list[str] = []
    reporter = Reporter()
    reporter.say = said.append  # type: ignore[method-assign]
    manifest = run_on_urls(reporter=reporter, **options)
    assert said == ["memory://bucket/out is prepared already"]
    assert comparable(manifest) == comparable(local)
    copy = tmp_path / "copy"
    memory.get("/bucket/out/", f"{copy}/", recursive=True)
    quarantined = {
        folder: json.loads((folder / "invalid" / "00001.jsonl").read_text("utf-8"))
        for folder in (copy, tmp_path / "local")
    }
    assert quarantined[copy].pop("file") == "memory://bucket/in/b.jsonl"
    assert quarantined[tmp_path / "local"].pop("file") == str(inputs[1])
    assert quarantined[copy] == quarantined[tmp_path / "local"]
    for folder in quarantined:
        (folder / "invalid" / "00001.jsonl").unlink()
    assert hashes(copy) == hashes(tmp_path / "local")
    store = open_store(
        str(copy / "text"),
        tokenizer,
        kind="text",
        validation_fraction=0.1,
        folder=copy / "tokens",
    )
    assert store.folder == copy / "tokens" / "text"


def test_changes_and_mistakes_are_noticed(memory: MemoryFileSystem) -> None:
    run_on_urls()
    with pytest.raises(UsageError, match=r"settings\.length\.minimum was 50 and is now 60"):
        run_on_urls("length.minimum=60")
    content = memory.cat_file("/bucket/in/a.jsonl")
    memory.pipe_file("/bucket/in/a.jsonl", content.replace(b'"text"', b'"TEXT"', 1))
    with pytest.raises(UsageError, match="has changed since it was read"):
        run_on_urls()
    memory.pipe_file("/bucket/in/a.jsonl", content)
    memory.rm("/bucket/out/text/part-00000.jsonl.zst")
    with pytest.raises(DataError, match="missing or incomplete"):
        run_on_urls()
    memory.rm("/bucket/out", recursive=True)
    memory.pipe_file("/bucket/out/thesis.docx", b"")
    with pytest.raises(UsageError, match=r"contains other files, such as thesis\.docx"):
        run_on_urls()


def test_too_many_invalid_records_are_kept(memory: MemoryFileSystem) -> None:
    memory.pipe_file("/bucket/in/a.jsonl", b"{\n" * 20)
    with pytest.raises(DataError, match=r"They are in memory://bucket/out/invalid/00000\.jsonl"):
        run_on_urls()
    assert memory.cat_file("/bucket/out/invalid/00000.jsonl").count(b"\n") == 20


def test_an_output_folder_inside_the_input_is_no_input(memory: MemoryFileSystem) -> None:
    def run_again(reporter: Reporter) -> dict[str, Any]:
        settings = load_prepare_settings("zh", SETTINGS)
        out = UrlPath("memory://bucket/in/clean")
        options: dict[str, Any] = {"workers": 1, "memory_bytes": 2_000_000_000}
        return prepare(["memory://bucket/in"], out, settings, reporter=reporter, **options)

    with contextlib.suppress(KeyboardInterrupt):
        run_again(_Interrupting())
    names = [entry["path"] for entry in run_again(Reporter())["inputs"]]
    assert names == ["memory://bucket/in/a.jsonl", "memory://bucket/in/b.jsonl"]
