"""Every command of the README and the guides is run, or named here with the reason why not.

Commands run as they stand, in a folder that holds what they need; training commands get a tiny
model and two steps. The Chinese pages have the same commands, as `docs.build` checks.
"""

import contextlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import zstandard
from typer.testing import CliRunner

from docs.build import DOCS, ROOT
from minimind.cli.main import app
from tests.support.small_exams import make_ceval

BLOCK = re.compile(r"^```sh\n(.*?)^```", re.M | re.S)
TRAINING = ("pretrain", "sft", "lora", "dpo")
TINY = {
    "device": "cpu",
    "data.seq_len": "64",
    "data.validation_fraction": "0.2",
    "training.steps": "2",
    "training.global_batch_size": "4",
    "validation.num_sequences": "4",
}
PRESETS = {"pretrain-moe": "nano-moe"}
# Not run, and why; a prefix of the command.
NOT_RUN = {
    "git clone": "the address of the repository is the reader's",
    "make demo": "tests/cli/test_demo.py (slow) runs the whole demo",
    "minimind demo": "the same",
    ".venv/bin/minimind demo": "the same",
    ". .venv/bin/activate": "changes the shell; the tests run in an environment already",
    "uv ": "needs uv and PyTorch's index",
    "uv run": "needs uv",
    "conda ": "needs conda",
    "docker ": "needs Docker",
    "python3 -m venv": "installs packages",
    "pip install": "installs packages",
    ".venv/bin/pip install": "installs packages",
    "torchrun": "tests/training/test_distributed.py and tests/cli/test_launcher.py use torchrun",
    "curl": "tests/serving sends such requests",
    "minimind serve": "tests/serving starts services on free ports",
    "minimind web": "tests/web opens the page in a browser",
    "llama-": "needs llama.cpp; tests/export/test_against_llama_cpp.py loads GGUF files in it",
    "ollama ": "needs Ollama; see tests/export/test_ollama.py",
    "python -m http.server": "tests/export/test_web.py serves the page",
    "minimind export web": "tests/export/test_web.py (slow) exports pages, which needs a network",
    "minimind compare A B --judge": "tests/cli/test_compare.py has judges",
    "minimind pretrain --data texts --tokenizer tok --out out/run --nproc 4 training.backend": (
        "tests/training/test_deepspeed_backend.py, where DeepSpeed is installed"
    ),
}
SLOW = ("minimind sweep", "minimind plan --data", "--nproc", "minimind doctor", "q4_k_m")


def commands() -> list[str]:
    """Return each command of the README and the documentation once, in order."""
    pages = [ROOT / "README.md", *sorted((DOCS / "en").rglob("*.md"))]
    found: dict[str, None] = {}
    for page in pages:
        for block in BLOCK.findall(page.read_text("utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                command = " ".join(line.partition("  #")[0].split())
                if command and not command.startswith("#"):
                    found[command] = None
    return list(found)


RUN = [command for command in commands() if not command.startswith(tuple(NOT_RUN))]


def test_every_exception_is_still_a_command() -> None:
    for prefix in NOT_RUN:
        assert any(command.startswith(prefix) for command in commands()), prefix


@pytest.fixture(scope="module")
def materials(small_demo: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, data and files under the names that the documentation uses."""
    demo = small_demo[0] / "out" / "demo"
    folder = tmp_path_factory.mktemp("documentation")
    corpus = demo / "corpus"
    for name in ("texts", "chats", "pairs", "models"):
        (folder / name).mkdir()
    text = (corpus / "pretrain.jsonl").read_bytes()
    (folder / "texts" / "a.jsonl").write_bytes(text)
    (folder / "texts" / "a.jsonl.zst").write_bytes(zstandard.compress(text))
    (folder / "poems.jsonl").write_bytes(text)
    chats = (corpus / "sft-single.jsonl").read_bytes()
    variables = {"role": "assistant", "content": "我叫{{name}}。"}
    named = {"messages": [{"role": "user", "content": "你叫什么名字？"}, variables]}
    (folder / "chats" / "a.jsonl").write_bytes(chats)
    line = json.dumps(named, ensure_ascii=False).encode() + b"\n"
    (folder / "chats.jsonl").write_bytes(line * 20 + chats)
    (folder / "pairs" / "a.jsonl").write_bytes((corpus / "dpo.jsonl").read_bytes())
    (folder / "questions.jsonl").write_text('{"question": "长江有多长？"}\n', encoding="utf-8")
    make_ceval(folder / "exams" / "ceval-exam")
    (folder / "my-recipe.toml").write_text(
        'extends = "pretrain-small"\nout = "out/mine"\ntokenizer = "out/tokenizer"\n'
        '[data]\nsources = ["texts/*.jsonl"]\n',
        encoding="utf-8",
    )
    shutil.copytree(demo, folder / "out" / "demo")
    for name, made in {
        "small": "pretrain",
        "small-chat": "sft-multi",
        "small-dpo": "dpo",
        "tokenizer": "tokenizer",
        "me": "identity",
        "a": "pretrain",
        "b": "sft-single",
    }.items():
        shutil.copytree(demo / made, folder / "out" / name)
    shutil.copytree(demo / "sft-multi" / "model", folder / "models" / "Qwen3-0.6B")
    shutil.copytree(demo / "tokenizer", folder / "tok")
    return folder


@pytest.mark.parametrize(
    "command",
    [pytest.param(c, marks=[pytest.mark.slow] if any(s in c for s in SLOW) else []) for c in RUN],
)
def test_a_command_of_the_documentation_runs(command: str, materials: Path) -> None:
    if "q4_k_m" in command:
        pytest.importorskip("llama_cpp")
    words = shlex.split(command)
    assert words.pop(0).removeprefix(".venv/bin/") == "minimind", f"say in NOT_RUN why: {command}"
    with contextlib.chdir(materials):
        set_aside = None
        if "--out" in words and (out := Path(words[words.index("--out") + 1])).exists():
            set_aside = out.rename(out.with_name(out.name + "-before"))
        if words[0] in TRAINING and "--explain" not in words:
            given = {word.partition("=")[0] for word in words if "=" in word}
            words += [f"{key}={value}" for key, value in TINY.items() if key not in given]
            if words[0] == "pretrain":
                words.append(f"model.preset={PRESETS.get(words[1], 'nano')}")
        if words[0] == "sweep":
            words += ["model.preset=nano", *(f"{key}={value}" for key, value in TINY.items())]
        done = CliRunner().invoke(app, words, input="长江有多长？\n")
        if set_aside:
            shutil.rmtree(out, ignore_errors=True)
            set_aside.rename(out)
    assert done.exit_code == 0, done.output
