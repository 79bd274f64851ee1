"""Model directories in MLX, without conversion and converted: `make test-compatibility`."""

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from minimind.inference.generate import generate_all
from minimind.model import load_model
from minimind.tokenizer import Tokenizer
from tests.compatibility.conftest import Runs
from tests.support.rounding import largest_difference, logits_rounding

mx = pytest.importorskip("mlx.core")
mlx_lm = pytest.importorskip("mlx_lm")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

TEXT = "长江很长，最后流入东海。"


def tool(*arguments: str | Path) -> str:
    command = [sys.executable, "-m", "mlx_lm", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_a_directory_as_it_is(architecture: str, runs: Runs) -> None:
    directory = runs.model(architecture)
    tokenizer, ours = Tokenizer.load(directory), load_model(directory).eval()
    theirs, their_tokenizer = mlx_lm.load(str(directory))
    ids = tokenizer.encode(TEXT)
    assert their_tokenizer.encode(TEXT) == ids
    logits = torch.from_numpy(np.array(theirs(mx.array([ids]))))
    with torch.no_grad():
        expected = ours.logits(ours(torch.tensor([ids])))
    assert largest_difference(logits, expected) <= logits_rounding(ours.config, len(ids))
    (written,) = generate_all(ours, tokenizer, [ids], max_new_tokens=20, stop_ids=frozenset())
    generate_step = importlib.import_module("mlx_lm.generate").generate_step
    steps = generate_step(mx.array(ids), theirs, max_tokens=20)
    assert [int(token) for token, _ in steps] == written


def test_the_lines_of_the_guide(runs: Runs, tmp_path: Path) -> None:
    directory, out = runs.model("llama"), tmp_path / "mlx"
    assert "Generation: 8 tokens" in tool(
        "generate", "--model", directory, "--prompt", "你好", "--max-tokens", "8"
    )
    tool("convert", "--hf-path", directory, "--mlx-path", out, "-q", "--q-group-size", "32")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {f.name for f in out.iterdir()}


def test_experts_are_not_supported_by_mlx_lm(runs: Runs) -> None:
    with pytest.raises(ValueError, match="granitemoeshared not supported"):
        mlx_lm.load(str(runs.model("granitemoeshared")))
