"""Choice of the KV cache's size for the available memory."""

import re

import pytest
import torch

from minimind.errors import ResourceError
from minimind.inference import capacity
from minimind.inference.batched_model import BatchedModel
from minimind.inference.capacity import CacheSize, CacheSizer, usable_bytes
from minimind.model import Transformer
from tests.support.tiny import make_tiny

# Llama-3.2-1B: 16 layers, 8 key/value heads of 64; in float32 64 KiB per position.
ONE_B = dict(num_hidden_layers=16, num_key_value_heads=8, head_dim=64, num_attention_heads=8)
GIB = 2**30


@pytest.fixture(scope="module")
def one_b() -> Transformer:
    """A model with the cache of Llama-3.2-1B and small weights."""
    return make_tiny(**ONE_B, hidden_size=16, intermediate_size=16, max_position_embeddings=131_072)


@pytest.mark.parametrize(
    ("gib", "slots", "context", "chosen"),
    [
        (None, None, None, (16, 131_072)),
        (300, None, None, (16, 131_072)),
        (64, None, None, (16, 65_472)),  # 2**20 positions, 64 per slot beyond the context
        (20, None, None, (16, 20_416)),
        (8, None, None, (15, 8_640)),
        (2, None, None, (3, 10_816)),
        (0.5, None, None, (1, 8_128)),
        (20, None, 2048, (16, 2048)),
        (2, None, 2048, (15, 2048)),
        (20, 4, None, (4, 81_856)),
        (20, 4, 2048, (4, 2048)),
        (300, None, 200_000, (16, 131_072)),
    ],
)
def test_the_cache_fits_into_memory(
    one_b: Transformer,
    gib: float | None,
    slots: int | None,
    context: int | None,
    chosen: tuple[int, int],
) -> None:
    usable = None if gib is None else int(gib * GIB)
    sizer = CacheSizer(one_b, usable)
    size = sizer.size(slots, 16, context)
    assert size == CacheSize(*chosen)
    assert usable is None or sizer.bytes(size.slots, size.context) <= usable


@pytest.mark.parametrize("slots", [None, 1, 2, 16, 200])
@pytest.mark.parametrize("context", [None, 1, 63, 64, 65, 2048, 131_072])
@pytest.mark.parametrize("mib", [0, 1, 17, 40, 300, 5000])
def test_advised_sizes_fit_even_with_less_memory(
    one_b: Transformer, mib: int, context: int | None, slots: int | None
) -> None:
    try:
        CacheSizer(one_b, mib << 20).size(slots, 16, context)
        return
    except ResourceError as error:
        [advice] = re.findall(r"give (.*)$", str(error))
    if advice == "a smaller model":
        with pytest.raises(ResourceError):
            CacheSizer(one_b, (mib << 20) * 3 // 4).size(1, 16, 64)
        return
    for alternative in advice.split(" or "):
        sizes = {"--context": context, "--slots": slots}
        flags = alternative.split()
        sizes |= {name: int(value) for name, value in zip(flags[::2], flags[1::2], strict=True)}
        later = CacheSizer(one_b, (mib << 20) * 4 // 5)
        later.size(sizes["--slots"], 16, sizes["--context"])


def test_bytes_equal_those_of_the_allocated_cache() -> None:
    for context in (1, 63, 64, 200):
        model = make_tiny()
        allocated = BatchedModel(model, 3, context).cache.data.nbytes
        assert CacheSizer(model, None).bytes(3, context) == allocated


def test_memory_for_the_packed_weights_is_left_free(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny(dtype=torch.bfloat16)
    weights = 2 * sum(parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr(capacity, "free_bytes", lambda device: weights * 3 + 10_000)
    assert usable_bytes([model]) == int((2 * weights + 10_000) * 0.8)
    assert usable_bytes([model, model]) == int((weights + 10_000) * 0.8)
    monkeypatch.setattr(capacity, "free_bytes", lambda device: 1)
    assert usable_bytes([model]) == 0
    monkeypatch.setattr(capacity, "free_bytes", lambda device: None)
    assert usable_bytes([model]) is None
