"""Variable-length attention: its bookkeeping on the CPU, its kernels on a GPU."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from minimind.model import varlen
from minimind.model.varlen import SegmentBounds, max_difference_from_mask, segment_offsets
from tests.support.tiny import SHAPES, VOCAB, make_tiny

SEGMENTS = np.array([[0, 0, 0, 1, 1, 2, 2, 2], [0] * 8, [0, 1, 1, 1, 1, 1, 1, 1]], np.int32)


def test_offsets_are_where_rows_and_segments_begin_padded_to_a_power_of_two() -> None:
    assert segment_offsets(SEGMENTS).tolist() == [0, 3, 5, 8, 16, 17, 24, 24, 24]
    assert segment_offsets(SEGMENTS[1:2]).tolist() == [0, 8]
    assert segment_offsets(SEGMENTS[:1]).tolist() == [0, 3, 5, 8, 8]


def attention_by_segment(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, *rest: object, scale: float, **options: object
) -> Tensor:
    """Do what `varlen_attn` is documented to do, one segment after the other."""
    assert options.pop("window_size") == (-1, 0)
    out = []
    for start, end in itertools.pairwise(starts.tolist()):
        rows = [x[start:end].transpose(0, 1) for x in (q, k, v)]  # [H or K, tokens, D]
        out.append(
            torch.nn.functional.scaled_dot_product_attention(
                *rows, is_causal=True, scale=scale, enable_gqa=True
            ).transpose(0, 1)
        )
    return torch.cat(out)


@pytest.mark.parametrize("shape", SHAPES)
def test_bounds_give_the_same_as_a_mask(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", attention_by_segment)
    monkeypatch.setattr("minimind.model.transformer.DTYPES", (torch.float32,))
    model = make_tiny(**SHAPES[shape])
    tokens = torch.randint(VOCAB, SEGMENTS.shape)
    segments = torch.from_numpy(SEGMENTS)
    bounds = SegmentBounds(torch.from_numpy(segment_offsets(SEGMENTS)), 8)
    masked = model(tokens, segments=segments)
    torch.testing.assert_close(model(tokens, segments=segments, bounds=bounds), masked)
    monkeypatch.setattr("minimind.model.transformer.DTYPES", ())
    assert torch.equal(model(tokens, segments=segments, bounds=bounds), masked)


def test_a_failing_kernel_is_reported_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: torch.device) -> float:
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(varlen, "max_difference_from_mask", fail)
    with pytest.warns(
        UserWarning, match=r"dense attention mask, which is slower: no kernel image$"
    ):
        assert not varlen.supports_varlen.__wrapped__(torch.device("cuda"))
    monkeypatch.setattr(varlen, "max_difference_from_mask", lambda device: 0.5)
    with pytest.warns(UserWarning, match=r"results differ by 0\.500"):
        assert not varlen.supports_varlen.__wrapped__(torch.device("cuda"))
    monkeypatch.setattr(varlen, "max_difference_from_mask", lambda device: 0.001)
    assert varlen.supports_varlen.__wrapped__(torch.device("cuda"))
    assert not varlen.supports_varlen(torch.device("cpu"))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_trial_may_run_during_validation(
    mode: type[torch.no_grad | torch.inference_mode], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients are disabled there, and autocast would compute the reference in bf16."""
    dtypes = []

    def attention(q: Tensor, *rest: Tensor, **options: Any) -> Tensor:
        dtypes.append(q.dtype)
        return attention_by_segment(q, *rest, **options)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", attention)
    expected = max_difference_from_mask(torch.device("cpu"))
    with mode(), torch.autocast("cpu", torch.float16):
        assert max_difference_from_mask(torch.device("cpu")) == expected < 0.02
    assert dtypes == [torch.bfloat16] * 2


@pytest.mark.gpu
def test_the_kernel_equals_a_mask() -> None:
    assert max_difference_from_mask(torch.device("cuda")) < 0.02
    assert varlen.supports_varlen(torch.device("cuda"))
