import json
import re
import shlex
import sys
from inspect import signature
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from minimind.cli.main import app
from minimind.cli.tokenizer import train
from minimind.tokenizer import Tokenizer, train_tokenizer


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["tokenizer", *map(str, arguments)])


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    lines = [{"text": "长江是中国最长的河流。"}, {"text": "The river and the sea."}] * 20
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_train_then_inspect(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "tokenizer"
    done = run("train", texts, "--out", out, "--vocab-size", 300)
    assert done.exit_code == 0, done.output
    assert f"The tokenizer with 300 tokens is in {out}." in done.output
    assert Tokenizer.load(out).vocab_size == 300
    done = run("inspect", out)
    assert done.exit_code == 0, done.output
    assert "a few built-in sentences" in done.output
    assert "unused" not in done.output


@pytest.mark.skipif(sys.platform == "win32", reason="another shell")
@pytest.mark.parametrize("name", ["我的 词表[1]", "it's $HOME"])
def test_the_suggested_command_works_when_pasted(texts: Path, tmp_path: Path, name: str) -> None:
    done = run("train", texts, "--out", tmp_path / name, "--vocab-size", 300)
    _, found, suggested = done.output.rstrip().rpartition("minimind tokenizer ")
    assert found
    assert run(*shlex.split(suggested)).exit_code == 0


def test_defaults_match_train_tokenizer() -> None:
    of_command, of_function = (signature(f).parameters for f in (train, train_tokenizer))
    assert of_command["vocab_size"].default == of_function["vocab_size"].default
    assert of_command["sample_mb"].default << 20 == of_function["sample_bytes"].default


def test_several_files_are_combined(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("山山山山\n", encoding="utf-8")
    run("train", texts, tmp_path / "more.txt", "--out", tmp_path / "out")
    assert len(Tokenizer.load(tmp_path / "out").encode("山山山山")) == 1


def test_inspect_compares_tokenizers(texts: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    run("train", texts, "--out", tmp_path / "other", "--vocab-size", 280)
    metrics = tmp_path / "metrics.json"
    done = run("inspect", tokenizer_dir, tmp_path / "other", "--data", texts, "--json", metrics)
    assert done.exit_code == 0, done.output
    assert "unused" in done.output
    written = json.loads(metrics.read_text("utf-8"))
    assert written["measured_on"] == [str(texts)]
    ours, other = written["tokenizers"].values()
    assert (ours["num_tokens"], other["num_tokens"]) == (600, 280)
    assert ours["characters_per_token"]["Chinese"] > other["characters_per_token"]["Chinese"]


def test_invalid_lines_are_skipped_and_reported(texts: Path, tmp_path: Path) -> None:
    texts.write_bytes(b"{broken\n" + texts.read_bytes())
    done = run("train", texts, "--out", tmp_path / "out", "--vocab-size", 280)
    assert done.exit_code == 0, done.output
    assert ":1: not JSON" in done.output
    assert re.search(r"\. 1 of \d+ records are invalid: 1 × not JSON", done.output)
    assert "They are left out" in done.output
    done = run("inspect", tmp_path / "out", "--data", texts)
    assert ":1: not JSON" in done.output and "They are left out" in done.output


def test_an_existing_tokenizer_is_not_overwritten(texts: Path, tokenizer_dir: Path) -> None:
    before = (tokenizer_dir / "tokenizer.json").read_bytes()
    done = run("train", texts, "--out", tokenizer_dir)
    assert done.exit_code == 1
    assert "already contains a tokenizer" in done.output
    assert (tokenizer_dir / "tokenizer.json").read_bytes() == before


def test_errors_print_one_line(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{broken\n" * 3)
    (tmp_path / "file").write_text("")
    out = ["--out", tmp_path / "out"]
    for arguments, message in [
        (["train", tmp_path / "nowhere", *out], "there is no such file"),
        (["train", tmp_path / "bad.jsonl", *out], "bad.jsonl:1: not JSON"),
        (["train", tmp_path / "bad.jsonl", *out], "shows its contents), or leave it out"),
        (["train", texts, *out, "--vocab-size", 100], "too small"),
        (["train", texts, "--out", tmp_path / "file"], "file is a file, not a folder"),
        (["inspect", tmp_path], "is not a tokenizer directory"),
        (["inspect", tmp_path / "nowhere"], "nowhere does not exist"),
    ]:
        done = run(*arguments)
        assert done.exit_code == 1, arguments
        [error] = [line for line in done.stderr.splitlines() if line.strip()]
        assert error.startswith("error: ")
        assert message in error
    assert not (tmp_path / "out" / "tokenizer.json").exists()
