"""Exported ONNX graphs in onnxruntime, compared with transformers: `make test-compatibility`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minimind.cli.main import app
from minimind.export.onnx import GRAPH, export_onnx
from minimind.tokenizer import Tokenizer
from tests.support.small_models import save_small_model

pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

Cache = list[np.ndarray]


class Graph:
    """An exported folder, used as transformers.js uses it: from config.json and tensor names."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text("utf-8"))
        self.session = onnxruntime.InferenceSession(str(folder / GRAPH))

    def empty_cache(self, batch: int) -> Cache:
        heads, width = self.config["num_key_value_heads"], self.config["head_dim"]
        empty = np.zeros((batch, heads, 0, width), np.float32)
        return [empty] * (2 * self.config["num_hidden_layers"])

    def run(
        self, ids: np.ndarray, cache: Cache, mask: np.ndarray, positions: np.ndarray
    ) -> tuple[np.ndarray, Cache]:
        feed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        names = [i.name for i in self.session.get_inputs() if i.name.startswith("past_key_values.")]
        feed |= dict(zip(names, cache, strict=True))
        logits, *present = self.session.run(None, feed)
        return logits, present

    def greedy(self, prompts: list[list[int]], count: int) -> tuple[list[list[int]], np.ndarray]:
        """The greedy tokens after each prompt, padded on the left, and the logits of all steps."""
        longest = max(map(len, prompts))
        ids = np.array([[0] * (longest - len(p)) + p for p in prompts])
        mask = np.array([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        cache, written, steps = self.empty_cache(len(prompts)), [], []
        while len(written) < count:
            positions = (mask.cumsum(-1) - 1).clip(0)[:, -ids.shape[1] :]
            logits, cache = self.run(ids, cache, mask, positions)
            steps.append(logits[:, -1])
            ids = logits[:, -1:].argmax(-1)
            written.append(ids[:, 0])
            mask = np.concatenate((mask, np.ones_like(ids)), axis=1)
        return np.stack(written, axis=1).tolist(), np.stack(steps, axis=1)


def load_theirs(directory: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.eval()


@torch.no_grad()
def their_greedy(model: Any, prompt: list[int], count: int) -> tuple[list[int], np.ndarray]:
    ids, cache, steps = torch.tensor([prompt]), None, []
    for _ in range(count):
        out = model(ids, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits[0, -1].numpy())
        ids = out.logits[:, -1:].argmax(-1)
    logits = np.stack(steps)
    return logits.argmax(-1).tolist(), logits


@pytest.mark.parametrize("kind", ["llama", "untied", "qwen3", "granite", "yarn"])
def test_greedy_tokens_are_those_of_transformers(
    kind: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Two prompts of different lengths in one batch, up to the end of the context."""
    model = save_small_model(tmp_path / "model", kind, tokenizer)
    export_onnx(tmp_path / "model", tmp_path / "out")
    theirs = load_theirs(tmp_path / "model")
    assert "site-packages" not in (tmp_path / "out" / GRAPH).read_bytes().decode("latin-1")
    prompts = [torch.randint(600, (length,)).tolist() for length in (3, 12)]
    count = model.config.max_position_embeddings - 12
    written, logits = Graph(tmp_path / "out").greedy(prompts, count)
    for prompt, ours, our_logits in zip(prompts, written, logits, strict=True):
        expected, their_logits = their_greedy(theirs, prompt, count)
        assert ours == expected
        difference = np.abs(our_logits - their_logits).max()
        print(f"{kind}: {count} tokens, largest difference {difference:.1e}")
        assert difference <= 1e-5 * np.abs(their_logits).max()


def test_the_folder_and_the_names_that_transformers_js_reads(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from typer.testing import CliRunner

    save_small_model(tmp_path / "run" / "model", "llama", tokenizer)
    arguments = ["export", "onnx", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1 and "already exists; delete it or choose" in done.output
    files = {str(f.relative_to(tmp_path / "out")) for f in (tmp_path / "out").rglob("*.*")}
    assert files == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "onnx/model.onnx",
    }
    graph = onnx.load(tmp_path / "out" / GRAPH).graph

    def dims(values: Any) -> dict[str, list[str | int]]:
        return {
            value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
            for value in values
        }

    cache = ["batch_size", 2, "past_sequence_length", 32]
    present = ["batch_size", 2, "total_sequence_length", 32]
    expected = {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
    }
    names = [f"{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    assert dims(graph.input) == expected | {f"past_key_values.{name}": cache for name in names}
    assert dims(graph.output) == {"logits": ["batch_size", "sequence_length", 600]} | {
        f"present.{name}": present for name in names
    }
