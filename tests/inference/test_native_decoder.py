"""Decoding in compiled code, compared with torch, and what happens without a compiler."""

import itertools
from typing import Any

import pytest
import torch

from minimind.environment import NATIVE_VARIABLE
from minimind.inference.batched_model import BatchedModel, Part
from minimind.inference.native_library import unavailable_reason
from minimind.model import native
from tests.support.decoding import enable_native
from tests.support.tiny import SHAPES, chunks_of, make_tiny, random_tokens

# Widths that are not multiples of a panel or a tile of any processor.
UNEVEN = dict(hidden_size=36, intermediate_size=44, num_attention_heads=6, num_key_value_heads=3)
# bfloat16 instructions take multiples of 32.
WIDE = dict(hidden_size=96, intermediate_size=160, head_dim=16, num_attention_heads=6)
ALL_SHAPES: dict[str, Any] = dict(SHAPES, uneven=UNEVEN, wide=WIDE)
TOLERANCES = {"float32": 1e-5, "bfloat16": 0.02, "int8": 0.02}  # relative, of the logits of a token


def decoded(
    kind: str, shape: dict[str, Any], *, slots: int = 9, threads: int = 1
) -> tuple[BatchedModel, torch.Tensor]:
    """Return a model and the logits [steps, slots, vocab] of sequences of different lengths."""
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    batch = BatchedModel(
        make_tiny(dtype, **shape), slots, 256, int8=kind == "int8", threads=threads
    )
    sequences = [random_tokens(30 + 9 * slot, slot) for slot in range(slots)]
    for slot, ids in enumerate(sequences):
        batch.forward([], chunks_of(slot, ids[:-8]))
    steps = []
    for left in range(8, 0, -1):
        ends = [(slot, len(ids) - left) for slot, ids in enumerate(sequences)]
        parts = [Part(slot, end, sequences[slot][end : end + 1]) for slot, end in ends]
        steps.append(batch.forward(parts, []))
    return batch, torch.stack(steps)


@pytest.mark.numeric
@pytest.mark.parametrize("kind", TOLERANCES)
@pytest.mark.parametrize("shape", ALL_SHAPES)
def test_logits_equal_those_of_torch(
    shape: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = ALL_SHAPES[shape]
    torch_model, expected = decoded(kind, sizes)
    enable_native(monkeypatch)
    native_model, actual = decoded(kind, sizes)
    assert native_model.is_native and not torch_model.is_native
    errors = (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
    # In bfloat16 a router may choose other experts for a few tokens.
    assert (errors.max() if kind == "float32" else errors.median()) < TOLERANCES[kind]


@pytest.mark.numeric
@pytest.mark.parametrize("kind", TOLERANCES)
def test_bits_do_not_depend_on_the_number_of_threads(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    enable_native(monkeypatch)
    results = []
    for threads in (1, 2, 3):
        dtype = torch.float32 if kind == "float32" else torch.bfloat16
        model = make_tiny(dtype, **ALL_SHAPES["experts"] | WIDE)
        batch = BatchedModel(model, 20, 256, int8=kind == "int8", threads=threads)
        steps = [batch.forward([Part(s, at, (s + at,)) for s in range(20)], []) for at in range(9)]
        results.append(torch.stack(steps))
    assert all(torch.equal(results[0], result) for result in results[1:])


@pytest.mark.numeric
@pytest.mark.parametrize("kind", TOLERANCES)
@pytest.mark.parametrize("kv_heads", [1, 2, 6])  # 6, 3 or 1 queries of a row share keys and values
def test_bits_do_not_depend_on_the_parts_of_a_prompt(
    kind: str, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that are processed together share passes over keys and values."""
    enable_native(monkeypatch)
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    model = make_tiny(dtype, **WIDE | dict(num_key_value_heads=kv_heads))
    ids, results = random_tokens(50, 0), []
    for parts in ([1] * 50, [50], [3, 1, 7, 20, 2, 17]):
        batch = BatchedModel(model, 2, 64, int8=kind == "int8", threads=2)
        ends = list(itertools.accumulate(parts))
        results.append(
            torch.cat(
                [
                    batch.forward([], [Part(1, end - n, ids[end - n : end], 0, n)])
                    for n, end in zip(parts, ends, strict=True)
                ]
            )
        )
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_logits_that_are_not_finite_stay_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine recognizes a damaged sequence by its logits."""
    enable_native(monkeypatch)
    model = make_tiny(torch.bfloat16, **WIDE)
    with torch.no_grad():
        model.model.embed_tokens.weight[7, 3] = torch.nan
        model.model.embed_tokens.weight[8, 3] = torch.inf
    batch = BatchedModel(model, 3, 64)
    # The head is the embedding: logits of tokens 7 and 8 are never finite.
    logits = batch.forward([Part(0, 0, (7,)), Part(1, 0, (8,)), Part(2, 0, (9,))], [])
    finite = logits.isfinite().sum(-1).tolist()
    assert finite == [0, 0, logits.shape[-1] - 2]


def test_head_dimensions_that_are_not_supported_use_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    enable_native(monkeypatch)
    batch = BatchedModel(make_tiny(head_dim=12), 1, 64)
    assert not batch.is_native
    assert batch.forward([Part(0, 0, (7,))], []).isfinite().all()


def test_without_a_compiler_decoding_runs_on_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NATIVE_VARIABLE, "1")
    monkeypatch.setattr(native, "_load", native._load.__wrapped__)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert unavailable_reason() == "no C++ compiler; install g++"
    assert not BatchedModel(make_tiny(), 1, 64).is_native
