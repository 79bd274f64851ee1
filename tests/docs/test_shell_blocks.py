"""Every command of the README and the guides is run, or listed here with the reason why not.

Commands run as they stand, in a folder that holds what they need; training commands get a tiny
model and two steps. The Chinese pages have the same commands, as `docs.build` checks.
"""

import contextlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx2 as httpx
import pytest
import zstandard
from typer.testing import CliRunner

from docs.build import DOCS, ROOT
from minimind.cli import road_plan
from minimind.cli.main import app
from minimind.data.download import record_origin
from minimind.data.registry import find
from minimind.planning import attainable, bench
from tests.support.plots import draw_equal_plots_once
from tests.support.services import serving
from tests.support.small_benchmarks import make_ceval

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
# Prefix of each command that is not run: reason.
NOT_RUN = {
    "git clone": "the address of the repository is the reader's",
    "make demo": "tests/cli/test_demo.py (slow) runs the complete demo",
    "minimind demo": "the same",
    ".venv/bin/minimind demo": "the same",
    ". .venv/bin/activate": "changes the shell; the tests run in an environment already",
    "uv ": "needs uv and PyTorch's index",
    "conda ": "needs conda",
    "docker ": "needs Docker",
    "python3 -m venv": "installs packages",
    "pip install": "installs packages",
    ".venv/bin/pip install": "installs packages",
    "minimind export onnx": "tests/export/test_against_onnxruntime.py, where onnx is installed",
    "minimind import": "tests/cli/test_minimind_pth.py and tests/export/test_pth_import.py",
    "mlx_lm.": "tests/compatibility/test_mlx.py, where MLX is installed",
    "vllm ": "tests/compatibility/test_vllm.py, where vLLM is installed",
    "python -m sglang": "needs SGLang",
    "minimind get ": "tests/cli/test_get.py downloads models from a stand-in of the hubs",
    "minimind road my-road.toml": "the file is the reader's; tests/cli/test_road.py has one",
    "HF_TOKEN": "tests/cli/test_push.py publishes to stand-ins of the hubs",
    "mkdir texts": "prepares the next command",
    "zstd -dc huge": "needs zstd and a huge file",
    'minimind data prepare "s3://': "tests/data/prepare/test_object_store.py starts one",
    "aws s3": "needs the AWS command line",
    "minimind pretrain --tokenizer out/tokenizer --out out/small --data prepared/text": "the same",
    "minimind data pairs": "the small demo gives empty answers; see tests/cli/test_pairs.py",
    "git worktree add": "needs a clone with its history",
    "python -m benchmarks": "measures for minutes; tests/test_benchmarks.py has trials",
    "RAY_ADDRESS": "tests/data/prepare/test_engine.py (slow) starts a Ray cluster",
    "torchrun --nnodes 2": "needs two machines",
    "minimind web": "runs until it is stopped; tests/web opens the page in a browser",
    "minimind compare A B --judge": "needs a judge there; tests/cli/test_compare.py has one",
    "llama-": "needs llama.cpp; tests/export/test_against_llama_cpp.py loads GGUF files in it",
    "ollama ": "needs Ollama; see tests/export/test_ollama.py",
    "python -m http.server": "tests/export/test_web.py serves the page",
    "minimind export web out/small-chat --out page --wllama": "needs the npm package as a file",
}
# Run against services that listen on free ports instead of 8000.
SERVE, REQUEST = "minimind serve", "curl http://127.0.0.1:8000"
SLOW = ("minimind sweep", "minimind plan --data", "--nproc", "minimind doctor")
SLOW += ("minimind export web", "q4_k_m")  # need npm and llama.cpp


def commands() -> list[str]:
    """Return each command of the README and the documentation once, in order."""
    pages = [ROOT / "README.md", *sorted((DOCS / "en").rglob("*.md"))]
    commands: dict[str, None] = {}
    for page in pages:
        for block in BLOCK.findall(page.read_text("utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                command = " ".join(line.partition("  #")[0].split())
                if command and not command.startswith("#"):
                    commands[command] = None
    return list(commands)


DOWNLOADS = ("minimind road small",)  # whole commands that need gigabytes; see test_road.py
RUN = [c for c in commands() if not c.startswith((*NOT_RUN, SERVE, REQUEST)) and c not in DOWNLOADS]
SERVICES = [command for command in commands() if command.startswith(SERVE)]
REQUESTS = [command for command in commands() if command.startswith(REQUEST)]


def test_every_exception_is_still_a_command() -> None:
    for prefix in NOT_RUN:
        assert any(command.startswith(prefix) for command in commands()), prefix


def pretend_downloaded(name: str, content: bytes, folder: Path) -> None:
    """Store a small file as if a dataset had been downloaded."""
    path = find(name).path_in(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    record_origin(path, {"name": name})


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
    (folder / "out" / "prepared" / "text").mkdir(parents=True)
    (folder / "out" / "prepared" / "text" / "part-00000.jsonl.zst").write_bytes(
        zstandard.compress(text)
    )
    (folder / "strict.toml").write_text('extends = "zh"\n[length]\nminimum = 60\n', "utf-8")
    chats = (corpus / "sft-single.jsonl").read_bytes()
    variables = {"role": "assistant", "content": "我叫{{name}}。"}
    named = {"messages": [{"role": "user", "content": "你叫什么名字？"}, variables]}
    (folder / "chats" / "a.jsonl").write_bytes(chats)
    line = json.dumps(named, ensure_ascii=False).encode() + b"\n"
    (folder / "chats.jsonl").write_bytes(line * 20 + chats)
    for name in ("pairs/a.jsonl", "own-pairs.jsonl"):
        (folder / name).write_bytes((corpus / "dpo.jsonl").read_bytes())
    (folder / "questions.jsonl").write_text('{"question": "长江有多长？"}\n', encoding="utf-8")
    make_ceval(folder / "exams" / "ceval-exam")
    exams = shutil.make_archive(str(folder / "exams"), "zip", folder / "exams" / "ceval-exam")
    published = {
        "minimind:pretrain_mini": text,
        "minimind:sft_mini": chats,
        "skypile:2020-40_zh_head_0000": text,
        "ceval": Path(exams).read_bytes(),
    }
    for name, content in published.items():
        pretend_downloaded(name, content, folder / "data")
    (folder / "my-recipe.toml").write_text(
        'extends = "pretrain-small"\nout = "out/mine"\ntokenizer = "out/tokenizer"\n'
        '[data]\nsources = ["texts/*.jsonl"]\n',
        encoding="utf-8",
    )
    shutil.copytree(demo, folder / "out" / "demo")
    for name, run in {
        "small": "pretrain",
        "small-chat": "sft-multi",
        "small-dpo": "dpo",
        "tokenizer": "tokenizer",
        "me": "identity",
        "poet": "identity",
        "a": "pretrain",
        "b": "sft-single",
    }.items():
        shutil.copytree(demo / run, folder / "out" / name)
    shutil.copytree(demo / "sft-multi" / "model", folder / "models" / "Qwen3-0.6B")
    shutil.copytree(demo / "tokenizer", folder / "tok")
    return folder


@pytest.mark.parametrize(
    "command",
    [pytest.param(c, marks=[pytest.mark.slow] if any(s in c for s in SLOW) else []) for c in RUN],
)
def test_a_command_of_the_documentation_runs(
    command: str, materials: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(road_plan, "_TRIAL_S", 0.0)  # for each of three recipes
    # tests/planning/test_bench.py covers the processes of `bench` and real matrix products.
    monkeypatch.setattr(bench, "_in_process", lambda name, *rest: getattr(bench, name)(*rest))
    monkeypatch.setattr(attainable, "_CPU_SHAPES", ((64, 64, 64),))
    draw_equal_plots_once(monkeypatch)
    if "backend=deepspeed" in command:
        pytest.importorskip("deepspeed")
    if "q4_k_m" in command:
        pytest.importorskip("llama_cpp")
    arguments = shlex.split(command)
    launcher = arguments.pop(0).removeprefix(".venv/bin/")
    assert launcher in ("minimind", "torchrun"), f"say in NOT_RUN why: {command}"
    with contextlib.chdir(materials):
        set_aside = None
        if "--out" in arguments and (out := Path(arguments[arguments.index("--out") + 1])).exists():
            set_aside = out.rename(out.with_name(out.name + "-before"))
        arguments += small_settings(arguments)
        if launcher == "torchrun" or "--nproc" in arguments:  # starts its own command line again
            module = "torch.distributed.run" if launcher == "torchrun" else "minimind"
            script = [sys.executable, "-m", module, *arguments]
            done = subprocess.run(script, capture_output=True, text=True)
            status, output = done.returncode, done.stdout + done.stderr
        else:
            result = CliRunner().invoke(app, arguments, input="长江有多长？\n")
            status, output = result.exit_code, result.output
        if set_aside:
            shutil.rmtree(out, ignore_errors=True)
            set_aside.rename(out)
    assert status == 0, output


def small_settings(words: Sequence[str]) -> list[str]:
    """Return what makes a command short: a tiny model and two steps, one process, no repetition."""
    if words[0] == "bench":
        return ["--seconds", "0.01", *(["nano"] if len(words) == 1 else [])]
    if words[:2] == ["data", "prepare"]:
        return ["--workers", "1"]
    trains = words[0] != "data" and {*TRAINING, "sweep"} & set(words)
    if "--explain" in words or not trains:
        return []
    given = {word.partition("=")[0] for word in words if "=" in word}
    settings = [f"{key}={value}" for key, value in TINY.items() if key not in given]
    if words[0] == "sweep":
        settings.append("model.preset=nano")
    elif "pretrain" in words:
        recipe = words[words.index("pretrain") + 1]
        settings.append(f"model.preset={PRESETS.get(recipe, 'nano')}")
    return settings


@pytest.mark.parametrize(
    "command",
    [pytest.param(c, marks=[pytest.mark.slow] if n else []) for n, c in enumerate(SERVICES)],
)
def test_a_service_of_the_documentation_answers(
    command: str, materials: Path, tmp_path: Path
) -> None:
    folder, *flags = shlex.split(command.removeprefix(SERVE))
    flags = [flag.replace("=out/", f"={materials}/out/") for flag in flags]
    with serving(materials / folder, tmp_path / "log", *flags) as service:
        served = httpx.get(f"{service.url}/v1/models").json()["data"]
        names = {model["id"] for model in served}
        assert names >= ({"small-chat", "poet"} if flags else {"small-chat"})
        for request in REQUESTS if shutil.which("curl") else []:
            request = request.replace("http://127.0.0.1:8000", service.url)
            done = subprocess.run(shlex.split(request), capture_output=True, check=True)
            assert json.loads(done.stdout)["choices"][0]["finish_reason"], done.stdout
        assert service.end() == 0
