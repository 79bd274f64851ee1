"""Published datasets by name, from a stand-in of the hubs, as a user downloads and uses them."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from minimind.cli.main import app
from minimind.data.registry import find
from tests.conftest import TEXTS
from tests.support.hub_server import HubServer, hub_environment, run_hub_server

CHATS = [
    {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": text}]}
    for text in TEXTS
]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.chdir(tmp_path)
    with run_hub_server() as server:
        for variable in ("HF_TOKEN", "HF_HUB_OFFLINE", "MODELSCOPE_API_TOKEN", "MINIMIND_DATA"):
            monkeypatch.delenv(variable, raising=False)
        for name, value in hub_environment(server).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "cache"))
        yield server


def add(hub: HubServer, name: str, content: bytes, on: str = "hf") -> None:
    """Publish the file of a registered dataset with this content."""
    published = find(name)
    hub.commit = published.set.revision or hub.commit
    repository = published.set.hf if on == "hf" else published.set.modelscope
    assert repository
    hub.add(repository, published.file.path, content, on)


def lines(records: list[dict[str, object]]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def run(*arguments: object, **options: object) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments], **options)


def test_list_and_info_show_the_facts() -> None:
    done = run("data", "list")
    assert done.exit_code == 0
    for name in ("minimind-v1", "skypile", "deepctrl-sft", "coig-cqia", "gsm8k"):
        assert f"│ {name} " in done.output
    done = run("data", "list", "--stage", "dpo", "--language", "en")
    assert "│ minimind " in done.output and "dpo" in done.output
    assert "skypile" not in done.output and "sft_mini" not in done.output
    done = run("data", "info", "belle-3.5m")
    assert "gpl-3.0" in done.output and "not pinned: the latest version" in done.output
    done = run("data", "info", "coig-cqia:full")
    assert "4d0da4efd3f5e52a52f1" in done.output and "unknown" in done.output
    done = run("data", "info", "belle")
    assert "there is no dataset 'belle'; did you mean belle-2m?" in done.stderr


def test_get_asks_downloads_and_keeps(hub: HubServer, tmp_path: Path) -> None:
    add(hub, "cmmlu", b"PK the archive")
    add(hub, "gsm8k", b"PAR1", "hf")
    refused = run("data", "get", "cmmlu")
    assert refused.exit_code == 1
    assert "cmmlu:v1_0_1 (size: about 1.1 MB, licence: cc-by-nc-4.0)" in refused.stderr
    assert "add --yes to accept the licence and download" in refused.stderr
    assert hub.requests == []
    for _ in range(2):  # the second time nothing is requested
        done = run("data", "get", "cmmlu", "--yes", "--dir", "folder")
        assert done.exit_code == 0, done.output
        where = Path("folder/cmmlu_v1_0_1.zip")
        note = "The file name contains the version."
        assert done.output.endswith(f"cmmlu:v1_0_1: {where}\n{note}\n")
    assert Path("folder/cmmlu_v1_0_1.zip").read_bytes() == b"PK the archive"
    assert len(hub.requests) == 2
    assert json.loads(Path("folder/cmmlu_v1_0_1.zip.origin").read_text())["hub"] == "hf"
    wrong = run("data", "get", "cmmlu", "--yes", "--hub", "modelscope")
    assert "cmmlu:v1_0_1 is not on ModelScope, but on Hugging Face; omit --hub" in wrong.stderr


def test_another_file_in_the_place_of_a_dataset_is_refused(hub: HubServer, tmp_path: Path) -> None:
    path = find("minimind:pretrain_mini").path_in(tmp_path / "data")
    path.parent.mkdir(parents=True)
    path.write_text('{"text": "a download that broke off"}\n')
    done = run("tokenizer", "train", "minimind:pretrain_mini", "--out", "out")
    assert done.exit_code == 1
    assert f"{path.name} is not the published file minimind:pretrain_mini" in done.output


def test_the_answer_in_a_terminal_decides(hub: HubServer, tmp_path: Path) -> None:
    add(hub, "cmmlu", b"PK the archive")
    for answer, status in (("n\n", 1), ("y\n", 0)):
        done, output = run_in_terminal(hub, tmp_path, answer, "data", "get", "cmmlu")
        assert done == status, output
        assert "cc-by-nc-4.0" in output
        assert "Download 14 bytes to data? [Y/n]" in output
        assert Path("data/cmmlu_v1_0_1.zip").is_file() == (status == 0)


def run_in_terminal(hub: HubServer, folder: Path, answer: str, *arguments: str) -> tuple[int, str]:
    """Run a command with a terminal as standard input; return its status and output."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "minimind", *arguments],
        stdin=slave,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        text=True,
    )
    os.write(master, answer.encode())
    output = process.communicate(timeout=60)[0]
    os.close(master)
    os.close(slave)
    return process.returncode, output


def test_ctrl_c_keeps_what_is_downloaded(hub: HubServer, tmp_path: Path) -> None:
    add(hub, "cmmlu", b"0123456789" * 100)
    hub.faults["cmmlu_v1_0_1.zip"] = ["stall:500"]
    process = subprocess.Popen(
        [sys.executable, "-m", "minimind", "data", "get", "cmmlu", "--yes"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        text=True,
    )
    deadline = time.monotonic() + 60
    while not [part for part in tmp_path.glob("data/*.part") if part.stat().st_size == 500]:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "cmmlu:v1_0_1: 500 bytes are kept in data; the same command continues" in output
    assert errors == "\nstopped\n"
    hub.requests.clear()
    assert run("data", "get", "cmmlu", "--yes").exit_code == 0
    assert hub.downloads() == ["bytes=500-"]


def test_a_name_is_data_in_every_verb(hub: HubServer, tokenizer_dir: Path, tmp_path: Path) -> None:
    """Each verb downloads at first use with --yes; a weight after @ and a recipe work as well."""
    texts = lines([{"text": text * 5} for text in TEXTS])
    for name in ("minimind-v2:pretrain_hq", "minimind-v2:tokenizer_train"):
        add(hub, name, texts, "modelscope")
    add(hub, "minimind-v2:sft_mini_512", lines(CHATS), "modelscope")

    refused = run("data", "inspect", "minimind-v2:pretrain_hq")
    assert "not downloaded yet: minimind-v2:pretrain_hq (size: about 1.62 GB" in refused.stderr
    done = run("data", "inspect", "minimind-v2:pretrain_hq", "--yes")
    assert done.exit_code == 0, done.output
    assert "│ text   │" in done.output and "长江是中国最长的河流" in done.output
    assert Path("data/minimind-v2/pretrain_hq.jsonl").is_file()

    name = "minimind-v2:tokenizer_train"
    done = run("tokenizer", "train", name, "--vocab-size", 300, "--out", "tok", "--yes")
    assert done.exit_code == 0, done.output
    assert Path("data/minimind-v2/tokenizer_train.jsonl").is_file()

    small = ["model.preset=nano", "training.steps=1", "data.seq_len=16", "device=cpu"]
    small += ["data.validation_fraction=0.2", "training.global_batch_size=2"]
    options = ["--tokenizer", tokenizer_dir, "--out", "out", "--yes", *small]
    held_out = 'data.validation=["minimind-v2:sft_mini_512"]'
    done = run("pretrain", "--data", "minimind-v2:pretrain_hq@0.5", held_out, *options)
    assert done.exit_code == 0, done.output
    summary = json.loads(Path("out/summary.json").read_text("utf-8"))
    assert [(each["name"], each["revision"]) for each in summary["datasets"]] == [
        ("minimind-v2:pretrain_hq", "master"),
        ("minimind-v2:sft_mini_512", "master"),
    ]
    assert summary["datasets"][0]["licence"] == "apache-2.0, cc-by-nc-2.0"
    assert len(summary["datasets"][0]["sha256"]) == 64
    recipe = Path("out/recipe.toml").read_text("utf-8")
    assert 'path = "minimind-v2:pretrain_hq"' in recipe and "weight = 0.5" in recipe

    sft = ["sft", "--model", "out", "--data", "minimind-v2:lora_identity", "--out", "sft"]
    assert "add --yes" in run(*sft).stderr


def test_a_path_wins_over_a_name_and_an_unknown_name_has_suggestions(
    hub: HubServer, tmp_path: Path
) -> None:
    Path("ceval").mkdir()
    Path("ceval/a.jsonl").write_text('{"text": "mine"}\n')
    done = run("data", "inspect", "ceval")
    assert done.exit_code == 0, done.output
    assert "mine" in done.output
    done = run("data", "inspect", "skypil:2020-40_zh_head_0000")
    assert "did you mean skypile:2020-40_zh_head_0000?" in done.stderr
    done = run("data", "inspect", "minimind:sft_mimi", "--yes")
    assert "minimind has no file 'sft_mimi'; did you mean sft_mini?" in done.stderr
    assert hub.requests == []
