import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from minimind.cli.main import app
from minimind.cli.prepare import questions_of
from minimind.data.prepare.shards import read_shard
from tests.support.corpora import Corpus, write_texts

QUESTION = "甲公司在二零一五年十月投资了一个新的项目，此时应当要求乙公司编制哪一种预算？"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["data", "prepare", *map(str, arguments)])


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    corpus = Corpus()
    texts = [corpus.document(300) for _ in range(20)]
    return write_texts(Path("texts.jsonl"), [*texts, texts[3], "短", texts[5] + QUESTION])


def test_prepare_prints_counts_and_the_next_command(texts: Path, tokenizer_dir: Path) -> None:
    Path("exam.csv").write_text(f"question,A,B,C,D,answer\n{QUESTION},零,一,二,三,A\n", "utf-8")
    done = run(texts, "length.minimum=10", "--out", "out", "--workers", 1, "--tokenizer",
               tokenizer_dir, "--decontaminate", "choice:exam.csv", "--json", "m.json")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "decontamination: 1 questions" in done.output
    assert "│ exact duplicate    │" in done.output
    assert "kept. Report: out/report.html" in done.output
    assert re.search(r"Train on it: \S*minimind pretrain --data out/text --tokenizer", done.output)
    assert "data.store=out/tokens data.validation_fraction=0.0" in " ".join(done.output.split())
    manifest = json.loads(Path("m.json").read_text("utf-8"))
    assert manifest["documents"] == len(list(read_shard(Path("out/text/part-00000.jsonl.zst"))))
    dropped = {reason: entry["documents"] for reason, entry in manifest["dropped"].items()}
    assert dropped == {"benchmark question": 1, "exact duplicate": 1, "too short": 1}
    assert manifest["identity"]["settings"]["length"]["minimum"] == 10


def test_the_next_command_needs_a_tokenizer(texts: Path) -> None:
    done = run(texts, "length.minimum=10", "--out", "out", "--workers", 1)
    assert "minimind pretrain --data out/text --tokenizer TOKENIZER --out DIR" in done.output


def test_no_question_of_two_files_of_one_benchmark_is_lost(tmp_path: Path) -> None:
    """Only names that occur twice are extended by the path, so that others stay as they were."""
    specs = []
    for folder, questions in (("a", ["p", "q"]), ("b", ["r"]), ("c", ["s"])):
        path = tmp_path / folder / ("other.csv" if folder == "c" else "mine.csv")
        path.parent.mkdir()
        rows = [f"{question}?,1,2,A\n" for question in questions]
        path.write_text("question,A,B,answer\n" + "".join(rows), "utf-8")
        specs.append(f"choice:{path}")
    a, b, _ = specs
    assert questions_of([*specs, a]) == {
        f"{a}/mine-2": "p?",
        f"{a}/mine-3": "q?",
        f"{b}/mine-2": "r?",
        "choice/other-2": "s?",
    }
    assert questions_of([a, a]) == {"choice/mine-2": "p?", "choice/mine-3": "q?"}


def test_messages_say_what_to_do(texts: Path) -> None:
    Path("mine.toml").write_text('extends = "zh"\nlength.minimum = "ten"\n', "utf-8")
    for arguments, words in [
        (("--out", "out"), "Missing argument"),
        (("length.minimum=3", "--out", "out"), "no input is given"),
        ((texts, "--out", "out", "length.minimm=3"), "did you mean length.minimum?"),
        ((texts, "--out", "out", "--recipe", "zhh"), "did you mean zh?"),
        ((texts, "--out", "out", "--recipe", "mine.toml"), "mine.toml:2: length.minimum"),
        ((texts, "--out", "out", "--decontaminate", "ceval"), "add --yes"),
        ((texts, "--out", "out", "--memory", "0.1"), "give --memory "),
        ((texts, "--out", "out", "--memory", "nan"), "give a number of GB above 0"),
        ((texts, "--out", "out", "--memory", "inf"), "give a number of GB above 0"),
    ]:
        done = run(*arguments)
        assert done.exit_code != 0
        assert words in done.output, done.output
        assert "Traceback" not in done.output
    assert not Path("out").joinpath("work", "read").exists()


def test_a_glob_with_an_equals_sign_is_no_setting(texts: Path) -> None:
    folder = Path("year=2024")
    folder.mkdir()
    shutil.copy(texts, folder / texts.name)
    done = run("year=2024/*.jsonl", "--out", "out", "--workers", "1")
    assert done.exit_code == 0, done.output


@pytest.mark.slow
def test_ctrl_c_stops_all_processes_and_the_same_command_continues(texts: Path) -> None:
    """Ctrl-C in a terminal goes to all processes of the group."""
    big = write_texts(Path("big.jsonl"), [Corpus(n).document(3000) for n in range(1000)])
    command = [sys.executable, "-m", "minimind", "data", "prepare", str(big), str(texts),
               "--out", "out", "--workers", "2", "shard_mb=1"]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    while not any(Path("out/work/filter").glob("*.json")):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command again to continue" in output.decode()
    assert "Traceback" not in output.decode()
    with pytest.raises(ProcessLookupError):  # no process of the group is left
        for _ in range(100):
            os.killpg(process.pid, 0)
            time.sleep(0.05)
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
    assert Path("out/manifest.json").exists()
