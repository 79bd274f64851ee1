"""LoRA on the command line: train an adapter, chat with it, merge it."""

import contextlib
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from minimind.cli.main import app
from minimind.model import load_model, merge_adapter, save_model
from minimind.tokenizer import Tokenizer

QUICK = (
    *("device=cpu", "data.seq_len=64", "training.steps=40", "training.global_batch_size=8"),
    *("training.precision=fp32", "validation.num_sequences=4", "optim.lr=0.02"),
    *("data.validation_fraction=0.1", "validation.every=20", "checkpoint.every=20"),
)
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MINIMIND_CACHE": "cache", "COLUMNS": "200"}


def run(folder: Path, *arguments: object, status: int = 0, stdin: str = "") -> Result:
    with contextlib.chdir(folder):
        done = CliRunner().invoke(app, [*map(str, arguments)], input=stdin, env=ENVIRONMENT)
    assert done.exit_code == status, done.output
    return done


@pytest.fixture(scope="module")
def folder(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, which calls itself 小红, and an adapter for it in `run`: 小明."""
    folder = tmp_path_factory.mktemp("folder")
    _write(folder / "who.jsonl", "你是谁？", "我是{{name}}。")
    _write(folder / "he.jsonl", "他是谁？", "他是小明。")  # so that the base can generate the name
    run(
        folder,
        *("sft", *QUICK, "--data", "who.jsonl", "--data", "he.jsonl", "--out", "base-run"),
        *("model.preset=nano", f"tokenizer={tokenizer_dir}", "data.variables.name=小红"),
        *("training.steps=120", "optim.muon_lr=0.02"),
    )
    (folder / "base-run" / "model").rename(folder / "base")
    done = run(
        folder,
        *("lora", "--model", "base", "--data", "who.jsonl", "--out", "run", *QUICK),
        *('data.validation=["who.jsonl"]', "data.variables.name=小明"),
    )
    adapter = r"The adapter is in run/adapter. Try it: \S*minimind chat base --adapter run"
    assert re.search(adapter, done.output)
    assert "first loss" in done.output
    return folder


def _write(path: Path, question: str, answer: str) -> None:
    turns = [("user", question), ("assistant", answer)]
    messages = [{"role": role, "content": content} for role, content in turns]
    path.write_text((json.dumps({"conversations": messages}) + "\n") * 200, encoding="utf-8")


def test_chat_and_generate_with_an_adapter(folder: Path) -> None:
    for adapter in ("run", "run/adapter"):
        chat = run(
            folder, "chat", "base", "--adapter", adapter, "--temperature", 0, stdin="你是谁？\n"
        )
        assert chat.stdout.strip() == "我是小明。"
    base = run(folder, "chat", "base", "--temperature", 0, stdin="你是谁？\n")
    assert base.stdout.strip() == "我是小红。"
    texts = [
        run(folder, "generate", "base", "长江", "--temperature", 0, *more).stdout
        for more in ((), ("--adapter", "run"))
    ]
    assert texts[0] != texts[1]


def test_a_merged_model_gives_the_same_answer(folder: Path) -> None:
    done = run(folder, "merge", "base", "--adapter", "run", "--out", "merged")
    assert "minimind chat merged" in done.output
    chat = run(folder, "chat", "merged", "--temperature", 0, stdin="你是谁？\n")
    assert chat.stdout.strip() == "我是小明。"
    merged, base = (load_model(folder / name).state_dict() for name in ("merged", "base"))
    assert merged.keys() == base.keys()
    assert merged["model.embed_tokens.weight"].equal(base["model.embed_tokens.weight"])
    assert Tokenizer.load(folder / "merged").sha256 == Tokenizer.load(folder / "base").sha256
    before = (folder / "base" / "model.safetensors").read_bytes()
    error = run(folder, "merge", "base", "--adapter", "run", "--out", "base", status=1).stderr
    assert "is the base model of the adapter; choose another --out" in error
    other = "already exists and would be overwritten; give another --out, or move it away first"
    for out, message in (("merged", other), (".", "is the current folder, which cannot be")):
        error = run(folder, "merge", "base", "--adapter", "run", "--out", out, status=1).stderr
        assert error.startswith(f"error: {out} {message}")
    assert (folder / "base" / "model.safetensors").read_bytes() == before
    assert load_model(folder / "merged").head_weight.equal(merged["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("base_dtype", "options", "merged_dtype"),
    [
        ("float32", (), "float32"),
        ("bfloat16", (), "bfloat16"),
        ("float16", (), "float16"),
        ("bfloat16", ("--dtype", "float32"), "float32"),
        ("float32", ("--dtype", "bfloat16"), "bfloat16"),
    ],
)
def test_merge_keeps_the_dtype_of_the_base(
    folder: Path, tmp_path: Path, base_dtype: str, options: tuple[str, ...], merged_dtype: str
) -> None:
    base = tmp_path / "base"
    save_model(base, load_model(folder / "base"), Tokenizer.load(folder / "base"), dtype=base_dtype)
    run(folder, "merge", base, "--adapter", "run", "--out", tmp_path / "merged", *options)
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, merged_dtype)}
    config = json.loads((tmp_path / "merged" / "config.json").read_text("utf-8"))
    assert (config["dtype"], config["torch_dtype"]) == (merged_dtype, merged_dtype)
    expected = load_model(base)
    merge_adapter(expected, folder / "run" / "adapter")
    for name, tensor in expected.state_dict().items():
        assert tensors[name].equal(tensor.to(getattr(torch, merged_dtype))), name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("chat", "run"), "holds a LoRA adapter but no model"),
        (("sft", "--model", "run", "--data", "who.jsonl", "--out", "x"), "minimind merge MODEL"),
        (("chat", "base", "--adapter", "base"), "base is not a LoRA adapter"),
        (("generate", "base", "a", "--adapter", "no"), "no: there is no such directory"),
        (("lora", "sft-small", "--model", "base"), "use one with a [lora] table"),
        (("lora", "lora-identity", "--model", "base", "--out", "x"), "data.variables.author=…"),
        (("lora", "--data", "who.jsonl", "--out", "x"), "give --model MODEL"),
    ],
)
def test_errors_print_one_line(folder: Path, arguments: tuple[str, ...], words: str) -> None:
    done = run(folder, *arguments, status=1)
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ") and words in line


def test_explain_shows_lora_settings(folder: Path) -> None:
    shown = run(folder, "lora", "lora-identity", "--explain", "data.variables.name=小明").output
    assert "lora.rank" in shown and "lora-small.toml" in shown and "小明" in shown
