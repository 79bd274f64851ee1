"""The function that becomes an ONNX graph. The graph itself: test_against_onnxruntime.py."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minimind.errors import ModelError, UsageError
from minimind.export import onnx as onnx_export
from minimind.export.onnx import DecoderGraph, export_onnx
from minimind.model import Transformer
from minimind.tokenizer import Tokenizer
from tests.support.rounding import largest_difference, logits_rounding
from tests.support.small_models import ARCHITECTURES, save_small_model, small_model

KINDS = (*ARCHITECTURES, "linear", "yarn", "llama3", "dynamic")


def empty_cache(model: Transformer, batch: int) -> list[Tensor]:
    config = model.config
    shape = (batch, config.num_key_value_heads, 0, config.head_dim)
    return [torch.zeros(shape) for _ in range(2 * config.num_hidden_layers)]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_pieces_of_a_padded_batch(kind: str) -> None:
    """A prompt in two pieces and single tokens; the second sequence is padded on the left."""
    model = small_model(kind, 600)
    length, padding = 40, 7
    ids = torch.randint(600, (2, length))
    expected = model.logits(model(ids))[0], model.logits(model(ids[1:, padding:]))[0]
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[1, :padding] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    graph, cache, pieces = DecoderGraph(model), empty_cache(model, 2), []
    for start, end in ((0, 5), (5, 30), *((at, at + 1) for at in range(30, length))):
        out, *cache = graph(ids[:, start:end], mask[:, :end], positions[:, start:end], cache)
        pieces.append(out)
        assert cache[0].shape[2] == end
    logits = torch.cat(pieces, dim=1)
    bound = logits_rounding(model.config, length)
    assert largest_difference(logits[0], expected[0]) <= bound
    assert largest_difference(logits[1, padding:], expected[1]) <= bound


def test_refusals(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_small_model(tmp_path / "model", "llama", tokenizer)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UsageError, match=r"onnx and onnxscript are not installed; pip install"):
        export_onnx(tmp_path / "model", tmp_path / "out")
    monkeypatch.setattr(onnx_export, "_check_installed", lambda: None)
    monkeypatch.setattr(onnx_export, "_MAX_BYTES", 1000)
    with pytest.raises(ModelError, match="but one ONNX file holds at most 2 GB; export GGUF"):
        export_onnx(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()
