"""`--context` and `--slots`: the same in every command, with advice that works."""

import os
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import httpx2 as httpx
import pytest
import torch
from typer.testing import CliRunner

from minimind.cli.main import app
from minimind.inference import capacity
from minimind.inference.load import inference_dtype
from minimind.model import PRESETS, ModelConfig, Transformer, save_model
from minimind.tokenizer import Tokenizer
from tests.support.commands import fast_python
from tests.support.services import is_up, make_model, wait_until

CACHE_BYTES = 1_000_000  # free for KV caches; a position of the model takes 256 bytes
TRAINED_CONTEXT = 16_384


@dataclass(frozen=True)
class Machine:
    """A folder with models and text, on a machine with little free memory."""

    folder: Path
    free: int

    def run(self, verb: str, model: str, *options: str) -> str:
        """Return the output of a command, with "ACCEPTED" at its end if it succeeded."""
        arguments = {
            "generate": [model, "长江", "--max-new-tokens", "2"],
            "chat": [model, "--max-new-tokens", "2"],
            "eval": [model, "--task", "bpb", "--data", "long.txt", "--fresh", "--out", "eval"],
            "serve": [model, "--port", "0"],
        }[verb]
        command = [verb, *arguments, "--device", "cpu", *options]
        return self._serve(command) if verb == "serve" else self._run(command)

    def _run(self, command: list[str]) -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(capacity, "free_bytes", lambda device: self.free)
            patch.chdir(self.folder)
            done = CliRunner().invoke(app, command, input="长江在哪里？\n")
        return done.output if done.exit_code else done.output + "ACCEPTED"

    def _serve(self, command: list[str]) -> str:
        """Return the first lines of a server process, with "ACCEPTED" if it serves."""
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
        with subprocess.Popen(
            [*fast_python(), "-m", "tests.support.little_memory", str(self.free), *command],
            cwd=self.folder,
            env=environment | {"PYTHONPATH": os.getcwd()},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as child:
            try:
                assert child.stdout
                output = child.stdout.readline()
                if "error:" not in output:
                    url = output.split()[1]
                    output += child.stdout.readline()
                    wait_until(lambda: is_up(url.removesuffix("/v1")))
                    [model] = httpx.get(f"{url}/models").json()["data"]
                    output += f"max_model_len {model['max_model_len']}\nACCEPTED"
            finally:
                child.kill()
        return output


def make_tiny(**changes: object) -> Transformer:
    torch.manual_seed(0)
    shape = PRESETS["nano"] | {"vocab_size": 600, "max_position_embeddings": TRAINED_CONTEXT}
    return Transformer(ModelConfig(**shape | changes))


@pytest.fixture(scope="module")
def machine(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Machine:
    folder = tmp_path_factory.mktemp("machine")
    save_model(folder / "tiny", make_tiny(), tokenizer)
    extended = make_tiny(max_position_embeddings=1024)
    extended.extend_context(2048)
    save_model(folder / "extended", extended, tokenizer)
    save_model(folder / "short", make_model(tokenizer, seed=1, context=256), tokenizer)
    (folder / "long.txt").write_text("长江是中国最长的河流。" * 1500, encoding="utf-8")
    itemsize = inference_dtype(torch.device("cpu")).itemsize
    weights = itemsize * sum(parameter.numel() for parameter in make_tiny().parameters())
    return Machine(folder, weights + int(CACHE_BYTES / 0.8) + 1)


def parse_advice(output: str) -> list[list[str]]:
    """Return the alternatives that an error message recommends, as options."""
    if match := re.search(r"give a context of at most (\d+)", output):
        return [["--context", match[1]]]
    match = re.search(r"can be used for it; give (.*)", output)
    assert match, output
    return [shlex.split(one) for one in match[1].split(" or ")]


def with_advice(options: list[str], advice: list[str]) -> list[str]:
    """Return the options with those of the advice replacing them."""
    changed = dict(zip(options[::2], options[1::2], strict=True))
    changed |= dict(zip(advice[::2], advice[1::2], strict=True))
    return [word for pair in changed.items() for word in pair]


REJECTED = [
    *((verb, "tiny", "--context 16384", 1) for verb in ("generate", "chat", "eval", "serve")),
    ("serve", "tiny", "--context 2048 --slots 16", 2),
    ("serve", "tiny", "--slots 256", 1),
    ("generate", "tiny", "--context 1000000", 1),
    *((verb, "extended", "--context 4096", 1) for verb in ("generate", "chat", "eval", "serve")),
]


@pytest.mark.parametrize(("verb", "model", "options", "alternatives"), REJECTED)
def test_advice_is_accepted(
    machine: Machine, verb: str, model: str, options: str, alternatives: int
) -> None:
    error = machine.run(verb, model, *options.split())
    assert not error.endswith("ACCEPTED")
    assert "error:" in error or "failed" in error
    advice = parse_advice(error)
    assert len(advice) == alternatives, error
    for one in advice:
        again = machine.run(verb, model, *with_advice(options.split(), one))
        assert again.endswith("ACCEPTED"), (one, again)


@pytest.mark.parametrize("verb", ["generate", "chat", "serve"])
def test_a_scaling_needs_a_longer_context_as_its_error_says(machine: Machine, verb: str) -> None:
    error = machine.run(verb, "short", "--rope-scaling", "yarn")
    assert "give such a context, or no scaling" in error
    longer = machine.run(verb, "short", "--rope-scaling", "yarn", "--context", "512")
    assert longer.endswith("ACCEPTED"), longer


@pytest.mark.parametrize("verb", ["generate", "chat", "serve"])
def test_default_cache_fits_free_memory(machine: Machine, verb: str) -> None:
    output = machine.run(verb, "tiny")
    assert output.endswith("ACCEPTED")
    if verb == "serve":  # positions: 1,000,000 / 256 = 3,906, of which 61 steps of 64 are used
        assert (
            "tiny: KV cache of 1 × 3,840 tokens (976 KB); the model's context is 16,384" in output
        )
        assert "max_model_len 3840" in output
    else:
        assert (
            "free memory allows a context of only 3,840 tokens; the model supports 16,384" in output
        )


@pytest.mark.parametrize("context", [100, 512])
def test_serve_accepts_shorter_and_longer_contexts(machine: Machine, context: int) -> None:
    output = machine.run("serve", "short", "--context", str(context), "--slots", "1")
    assert f"short: KV cache of 1 × {context} tokens" in output
    assert f"max_model_len {context}" in output
