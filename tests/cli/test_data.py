import json
from pathlib import Path

import pytest
from filelock import FileLock
from typer.testing import CliRunner, Result

from minimind.cli.main import app
from minimind.data.store import open_store
from minimind.tokenizer import Tokenizer


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["data", "inspect", *map(str, arguments)])


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)  # short names, which tables do not wrap
    path = Path("texts.jsonl")
    lines = [json.dumps({"text": f"长江的第{n}段[bold]"}, ensure_ascii=False) for n in range(20)]
    path.write_text("\n".join([*lines, "{broken", lines[0]]), encoding="utf-8")
    return path


@pytest.fixture
def chats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = Path("chats.csv")
    path.write_text("q,a\n你是谁？,我是模型。\n", encoding="utf-8")
    return path


def test_inspect_describes_data(
    texts: Path, chats: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "metrics.json"
    done = run(texts, chats, "--tokenizer", tokenizer_dir, "--json", out)
    assert done.exit_code == 0, done.output
    assert "│ texts.jsonl:21 │ not JSON: " in done.output
    assert "characters per token" in done.output
    assert done.output.count("\n#1: 长江的第") == 3
    assert "[bold]" in done.output
    assert "\n#2: user: 你是谁？ ⏎ assistant: 我是模型。" in done.output
    written = json.loads(out.read_text("utf-8"))
    assert list(written["data"]) == [str(texts), str(chats)]
    assert written["data"][str(texts)]["duplicates"] == 1
    assert written["data"][str(chats)]["schemas"] == {"qa": 1}
    assert written["total"]["records"] == 22
    assert written["total"]["tokens"]["total"] > 0


def test_tokens_and_samples_are_optional(texts: Path) -> None:
    done = run(texts, "--samples", 0)
    assert done.exit_code == 0, done.output
    assert "token" not in done.output
    assert "#1:" not in done.output
    assert done.output.count("total") == 1  # a column title; one source has no total row


def test_unused_keys_are_counted(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "问", "name": "李雷"},
        {"role": "assistant", "content": "答", "logprobs": [0]},
    ]
    records = [{"messages": turns, "source": "x", "tools": None}, {"text": "文", "source": "y"}]
    path, out = tmp_path / "a.jsonl", tmp_path / "metrics.json"
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    done = run(path, "--json", out)
    assert done.exit_code == 0, done.output
    assert "Unused keys" in done.output
    assert "│ 1 │ source              │ 2       │" in done.output
    assert "│ 1 │ messages[].name     │ 1       │" in done.output
    keys = {"source": 2, "messages[].name": 1, "messages[].logprobs": 1}
    assert json.loads(out.read_text("utf-8"))["total"]["unused_keys"] == keys


def test_token_stores_are_listed_and_removed(
    texts: Path, chats: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "cache"))
    home = tmp_path / "cache" / "stores"

    def stores(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["data", "stores", *arguments])

    assert stores().output == f"{home}: total 0 stores, 0 bytes\n"
    text = open_store(str(texts), tokenizer, kind="text", max_invalid_fraction=1.0)
    chat = open_store(str(chats), tokenizer, kind="chat")
    damaged = open_store(str(chats), tokenizer, kind="text")
    (damaged.folder / "manifest.json").write_text("{")
    (home / "textbook-general.jsonl").write_text("mine")
    done = stores()
    assert done.exit_code == 0, done.output
    for store, kind in ((text, "text"), (chat, "chat"), (damaged, "damaged")):
        assert f"│ {store.folder.name[:8]} │ {kind} " in done.output
    assert "total 3 stores" in done.output
    assert stores("--remove", chat.folder.name[:8]).exit_code == 0
    assert not chat.folder.exists() and text.folder.exists()
    unknown = stores("--remove", "abc")
    assert (unknown.exit_code, text.folder.exists()) == (1, True)
    assert "has no store abc; omit KEY" in unknown.stderr
    ambiguous = stores("--remove", "")
    assert (ambiguous.exit_code, text.folder.exists()) == (1, True)
    assert "2 stores begin with ''; give a longer key" in ambiguous.stderr
    with FileLock(home / f"{text.folder.name}.lock"):
        kept = stores("--remove", "--store", str(home))
    assert f"{text.folder.name} is being built by another process" in kept.output
    assert "removed 1 store," in kept.output
    assert stores("--remove").exit_code == 0
    left = {path.name for path in home.iterdir() if not path.name.endswith(".lock")}
    assert left == {"textbook-general.jsonl"}


def test_schema_option(chats: Path, tmp_path: Path) -> None:
    out = tmp_path / "metrics.json"
    done = run(chats, "--schema", "text", "--json", out)
    assert done.exit_code == 0, done.output
    [reason] = json.loads(out.read_text("utf-8"))["total"]["invalid_reasons"]
    assert reason == "no field text or content; its fields are: q, a"


def test_errors_print_one_line(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "plain.jsonl.gz").write_text('{"text": "a"}')
    for arguments, message in [
        ([tmp_path / "text.jsonl"], "no such file or folder; "),
        ([texts, tmp_path / "empty.jsonl"], "empty.jsonl: the file is empty"),
        ([tmp_path / "plain.jsonl.gz"], "the content is not gzip"),
        ([texts, "--schema", "alpacca"], "--schema alpacca is unknown; choose auto, text"),
        ([texts, "--tokenizer", tmp_path], "is not a tokenizer directory"),
        ([texts, "--json", texts / "metrics.json"], "texts.jsonl"),
    ]:
        done = run(*arguments)
        assert done.exit_code == 1, arguments
        [error] = [line for line in done.stderr.splitlines() if line.strip()]
        assert error.startswith("error: ")
        assert message in error
