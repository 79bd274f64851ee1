import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.data_preparation import measure
from minimind.data.prepare import pipeline
from minimind.data.prepare.engine import EngineName
from minimind.data.prepare.pipeline import prepare
from minimind.data.prepare.settings import load_prepare_settings
from minimind.data.prepare.shards import read_shard
from minimind.data.store import TokenStore, open_store
from minimind.errors import DataError, MinimindError, UsageError
from minimind.tokenizer import Tokenizer
from minimind.training.reporter import Reporter
from tests.support.corpora import Corpus, write_texts
from tests.support.token_stores import documents

SETTINGS = ["shard_mb=1", "validation_fraction=0.1"]
QUESTION = "甲公司在二零一五年十月投资了一个新的项目，此时应当要求乙公司编制哪一种预算？"


def run(
    paths: list[Path], out: Path, *settings: str, engine: EngineName = "pool", **options: Any
) -> dict[str, Any]:
    loaded = load_prepare_settings("zh", [*SETTINGS, *settings])
    options = {"workers": 1, "memory_bytes": 2_000_000_000, "reporter": Reporter()} | options
    return prepare([str(path) for path in paths], out, loaded, engine=engine, **options)


def texts_in(out: Path) -> list[str]:
    return [text for path in sorted((out / "text").iterdir()) for text in read_shard(path)]


def hashes(out: Path) -> dict[str, str]:
    """Return the hash of every output, except for the manifests, which contain time stamps.

    The folder of the token store is named by the path of the text, so it is left out.
    """
    result = {}
    for path in sorted(out.rglob("*")):
        if path.is_file() and path.name not in ("manifest.json", ".lock"):
            in_store = path.parent.parent == out / "tokens"
            name = path.name if in_store else str(path.relative_to(out))
            result[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return result


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two files with exact and near copies, short texts and an invalid line."""
    corpus, folder = Corpus(), tmp_path_factory.mktemp("inputs")
    texts = [corpus.document(500) for _ in range(300)]
    second = [corpus.document(500) for _ in range(100)]
    second += [corpus.noisy(text) for text in texts[:50]]
    second += [corpus.edited(text, 0.02) for text in texts[50:100]]
    second += ["短文"] * 7 + [corpus.document(300) + QUESTION]
    files = [write_texts(folder / "a.jsonl", texts), write_texts(folder / "b.jsonl", second)]
    with files[1].open("a", encoding="utf-8") as stream:
        stream.write('{"text": 3\n{"q": "问题", "a": "回答"}\n')
    return files


def test_output_and_counts(inputs: list[Path], tokenizer_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    questions = {"exam/1": QUESTION}
    manifest = run(inputs, out, tokenizer=tokenizer_dir, questions=questions)
    dropped = {reason: entry["documents"] for reason, entry in manifest["dropped"].items()}
    assert dropped == {
        "exact duplicate": 50,
        "near-duplicate": 50,
        "too short": 7,
        "not running text": 1,
        "benchmark question": 1,
    }
    kept = texts_in(out)
    assert len(kept) == manifest["documents"] == 400
    originals = [json.loads(line)["text"] for line in inputs[0].read_text("utf-8").splitlines()]
    assert kept[:300] == originals
    assert manifest["inputs"][1]["invalid"] == {
        "records": 1,
        "reasons": {"not JSON: Expecting ',' delimiter": 1},
    }
    assert len((out / "invalid" / "00001.jsonl").read_text("utf-8").splitlines()) == 1
    assert sum(manifest["lengths"]["before"].values()) == 508
    assert manifest["input_documents"] == 400 + 109 == 400 + sum(dropped.values())
    assert sum(manifest["lengths"]["after"].values()) == 400
    assert manifest["cluster_sizes"] == {"2": 100}
    pairs = json.loads((out / "near-duplicates.json").read_text("utf-8"))
    assert len(pairs) == 50
    assert {pair["kept"] for pair in pairs} == {text[:600] for text in originals[50:100]}
    report = (out / "report.html").read_text("utf-8")
    assert "<svg" in report
    assert "benchmark question" in report
    assert not (out / "work").exists()
    for entry in manifest["files"]:
        content = (out / "text" / entry["name"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry["sha256"]


def test_training_finds_the_token_store(
    inputs: list[Path], tokenizer_dir: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """It equals the store that training would build from the text."""
    out = tmp_path / "out"
    manifest = run(inputs, out, tokenizer=tokenizer_dir)
    options: dict[str, Any] = {"kind": "text", "validation_fraction": 0.1}
    [folder] = (out / "tokens").iterdir()
    store = open_store(str(out / "text"), tokenizer, folder=out / "tokens", **options)
    assert store.folder == folder
    built = open_store(str(out / "text"), tokenizer, folder=tmp_path / "stores", **options)
    for split in ("train", "validation"):
        assert documents(store, split) == documents(built, split)
        assert manifest["tokens"][split] == built.manifest[split]["tokens"] > 0
        for name in ("documents", "characters", "bytes"):
            assert store.manifest[split][name] == built.manifest[split][name]
    assert TokenStore(folder).manifest.keys() == built.manifest.keys()


def test_the_output_does_not_depend_on_workers_or_memory(
    inputs: list[Path], tokenizer_dir: Path, tmp_path: Path
) -> None:
    for name, options in {
        "one": {"workers": 1},
        "two": {"workers": 2, "memory_bytes": 800_000_000},
    }.items():
        run(inputs, tmp_path / name, tokenizer=tokenizer_dir, **options)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")


def test_planted_copies_are_removed(tmp_path: Path) -> None:
    corpus = Corpus(5)
    originals = [corpus.document(length) for length in range(200, 1200, 5)]
    shares = {0.01: 0.99, 0.02: 0.99, 0.05: 0.97}
    copies = [corpus.edited(text, share) for share in shares for text in originals]
    files = [
        write_texts(tmp_path / "1.jsonl", originals),
        write_texts(tmp_path / "2.jsonl", copies),
        write_texts(tmp_path / "3.jsonl", list(map(corpus.noisy, originals))),
        write_texts(tmp_path / "4.jsonl", [corpus.document(700) for _ in range(100)]),
    ]
    manifest = run(files, tmp_path / "out")
    assert manifest["dropped"]["exact duplicate"]["documents"] == len(originals)
    kept = texts_in(tmp_path / "out")
    assert kept[: len(originals)] == originals  # the first of each is kept
    assert len(kept) - len(set(copies) & set(kept)) == len(originals) + 100  # no false positives
    for number, (share, bar) in enumerate(shares.items()):
        planted = copies[number * len(originals) : (number + 1) * len(originals)]
        assert 1 - len(set(planted) & set(kept)) / len(planted) >= bar, share


@pytest.mark.slow
def test_killed_anywhere_it_continues(
    inputs: list[Path], tokenizer_dir: Path, tmp_path: Path
) -> None:
    """SIGKILL the whole command at several moments, then compare with an uninterrupted run."""
    run(inputs, tmp_path / "whole", tokenizer=tokenizer_dir)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "minimind", "data", "prepare", *map(str, inputs), *SETTINGS,
               "--out", str(out), "--tokenizer", str(tokenizer_dir), "--workers", "2"]  # fmt: skip
    for stage in ("read", "filter", "match", "write"):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ)
        try:
            while not any((out / "work" / stage).glob("*.json")):
                assert process.poll() is None, f"it ended before {stage}"
                time.sleep(0.002)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert not (out / "manifest.json").exists()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ)
    assert hashes(out) == hashes(tmp_path / "whole")


class _Interrupting(Reporter):
    """Interrupts after every task."""

    def progress(self, done: int, total: int, note: str = "") -> None:
        raise KeyboardInterrupt


def test_interrupted_after_each_task_it_continues(
    inputs: list[Path], tokenizer_dir: Path, tmp_path: Path
) -> None:
    run(inputs, tmp_path / "whole", tokenizer=tokenizer_dir)
    tries = 0
    while not (tmp_path / "out" / "manifest.json").exists():
        tries += 1
        with contextlib.suppress(KeyboardInterrupt):
            run(inputs, tmp_path / "out", tokenizer=tokenizer_dir, reporter=_Interrupting())
    assert tries == 2 + 2 + 15 + 1 + 2 + 1  # the tasks of each stage, and the last try
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_an_output_folder_inside_the_input_is_no_input(inputs: list[Path], tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "data" / "clean"
    data.mkdir()
    shutil.copy(inputs[0], data)
    with contextlib.suppress(KeyboardInterrupt):
        run([data], out, reporter=_Interrupting())
    assert list((out / "work" / "read").iterdir())
    manifest = run([data, tmp_path / "data/**/*"], out)
    assert [entry["path"] for entry in manifest["inputs"]] == [str(data / "a.jsonl")]
    assert run([data], out) == json.loads((out / "manifest.json").read_text("utf-8"))
    with pytest.raises(UsageError, match=r"clean/text: all of its files are in --out "):
        run([data, out / "text"], out)


def test_inputs_are_not_needed_once_they_are_read(inputs: list[Path], tmp_path: Path) -> None:
    copies = [Path(shutil.copy(file, tmp_path)) for file in inputs]

    class _Removing(Reporter):
        def start(self, title: str, total: int, done: int = 0, unit: str = "step") -> None:
            if title == "clustering":
                for copy in copies:
                    copy.unlink()

    manifest = run(copies, tmp_path / "out", reporter=_Removing())
    assert [entry["bytes"] for entry in manifest["inputs"]] == [
        file.stat().st_size for file in inputs
    ]


def test_what_a_killed_process_and_file_managers_leave(inputs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with contextlib.suppress(KeyboardInterrupt):
        run(inputs, out, reporter=_Interrupting())
    (out / ".DS_Store").write_bytes(b"\xff")
    (out / "work" / "read" / "._00000.json").write_bytes(b"\xff")
    marker = next((out / "work" / "read").glob("[!.]*.json"))
    content = marker.read_bytes()
    marker.write_bytes(content[:9])
    with pytest.raises(DataError, match=rf"{marker.name} is damaged .*; remove it and run"):
        run(inputs, out)
    marker.write_bytes(content)
    manifest = run(inputs, out)
    # Killed after the manifest was written, before all working files were removed.
    (out / "work" / "filter").mkdir(parents=True)
    (out / "work" / "filter" / "00000-00000.jsonl.zst").touch()
    assert run(inputs, out) == manifest
    assert not (out / "work").exists()


def test_other_settings_and_inputs_are_noticed(inputs: list[Path], tmp_path: Path) -> None:
    out, copy = tmp_path / "out", tmp_path / "a.jsonl"
    lines = inputs[0].read_bytes().splitlines(keepends=True)
    copy.write_bytes(b"".join(lines[:100]))
    run([copy], out)
    said: list[str] = []
    reporter = Reporter()
    reporter.say = said.append  # type: ignore[method-assign]
    run([copy], out, reporter=reporter)
    assert said == [f"{out} is prepared already"]
    with pytest.raises(UsageError, match=r"settings\.length\.minimum was 50 and is now 60"):
        run([copy], out, "length.minimum=60")
    with pytest.raises(UsageError, match=r"inputs\.0\.path was "):
        run([inputs[1]], out)
    copy.write_bytes(b"".join([*lines[1:100], lines[0]]))  # of the same size
    with pytest.raises(UsageError, match="has changed since it was read"):
        run([copy], out)
    copy.write_bytes(b"".join(lines[:99]))
    with pytest.raises(UsageError, match=r"inputs\.0\.bytes was "):
        run([copy], out)
    copy.write_bytes(b"".join(lines[:100]))
    next((out / "text").iterdir()).unlink()
    with pytest.raises(DataError, match="missing or incomplete"):
        run([copy], out)


def test_bad_input_and_folders(inputs: list[Path], tmp_path: Path) -> None:
    english = write_texts(tmp_path / "en.jsonl", ["The river is long. " * 9])
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{\n" * 20, encoding="utf-8")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.docx").touch()
    for paths, out, settings, words in [
        ([tmp_path / "no.jsonl"], "out1", [], "there is no such file"),
        ([english], "out2", [], "no document passes the filters (1 too little Chinese)"),
        ([bad], "out3", [], "allow more with max_invalid_fraction=…; then choose another --out"),
        ([english], "other", [], "contains other files, such as thesis.docx"),
        ([english], "en.jsonl", [], "is a file; choose a folder"),
        ([english], "out4", ["length.minimun=3"], "did you mean length.minimum?"),
        ([english], "out4", ["length.minimum=-3"], "greater than or equal to 0"),
    ]:
        with pytest.raises(MinimindError) as caught:
            run(paths, tmp_path / out, *settings)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


def test_memory_limits_the_workers(inputs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"8 workers need .* GB of memory.*or --workers 3"):
        run(inputs, tmp_path / "out", workers=8, memory_bytes=600_000_000)
    with pytest.raises(UsageError, match=r"1 worker needs .*; give --memory [\d.]+$"):
        run(inputs, tmp_path / "out", workers=None, memory_bytes=100_000_000)


@pytest.mark.slow
def test_memory_of_all_processes_is_bounded(tmp_path: Path) -> None:
    corpus = Corpus()
    text = write_texts(tmp_path / "a.jsonl", [corpus.document(800) for _ in range(12_000)])
    metrics = measure([str(text)], ["--workers", "2", "--memory", "0.5"])
    assert metrics["mb"] > 25
    assert metrics["peak_mb"] < 500


def test_keys_are_matched_in_ranges_that_fit(
    inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(inputs, tmp_path / "whole")
    monkeypatch.setattr(pipeline, "BYTES_PER_KEY", 3_000_000)  # ranges for a huge input
    ranges = run(inputs, tmp_path / "ranges")
    assert hashes(tmp_path / "ranges") == hashes(tmp_path / "whole")
    assert ranges["dropped"] == whole["dropped"]
    monkeypatch.setattr(pipeline, "BYTES_PER_DOCUMENT", 10_000_000)
    with pytest.raises(UsageError, match="raise --memory or lower --workers"):
        run(inputs, tmp_path / "more")
