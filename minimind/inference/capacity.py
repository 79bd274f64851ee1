"""Size of the KV cache: chosen to fit into free memory."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from minimind.errors import ResourceError
from minimind.inference.kv_cache import CACHE_STEP, cache_positions
from minimind.inference.native_decoder import cache_dtype
from minimind.model import Transformer
from minimind.model.device import free_bytes
from minimind.units import format_memory

MAX_SLOTS = 16
_PREFERRED_CONTEXT = 8192  # tokens; slots are given up first to keep a context of this length
# Fractions of the free memory. The rest is for activations and other processes.
_USABLE_FRACTION = {"cpu": 0.8, "cuda": 0.9, "mps": 0.8}
_ADVICE_FRACTION = 0.75  # of what fits now; less may be free when the user retries
# Weights that `packed_layers.py` concatenates on a GPU. On a CPU every matrix is packed.
_CONCATENATED = (
    "q_proj.weight",
    "k_proj.weight",
    "v_proj.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
)


@dataclass(frozen=True)
class CacheSize:
    """Number of sequences in a KV cache, and tokens per sequence."""

    slots: int
    context: int


def usable_bytes(models: Sequence[Transformer]) -> int | None:
    """Return the bytes that the KV caches of `models`, on one device, may take together.

    None where the system does not report free memory. Memory for packed copies of the weights is
    left out.
    """
    device = models[0].head_weight.device
    if device.type == "mps":
        free: int | None = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    else:
        if device.type == "cuda":
            torch.cuda.empty_cache()  # return the memory that loading left in the caching allocator
        free = free_bytes(device)
    if free is None:
        return None
    packed = sum(
        parameter.nbytes
        for model in models
        for name, parameter in model.named_parameters()
        if device.type == "cpu" or name.endswith(_CONCATENATED)
    )
    return max(int((free - packed) * _USABLE_FRACTION[device.type]), 0)


class CacheSizer:
    """Chooses the size of one model's cache within `usable` bytes (None = no limit)."""

    def __init__(self, model: Transformer, usable: int | None) -> None:
        config, weight = model.config, model.head_weight
        self._device, self._usable = weight.device, usable
        self._longest = config.max_position_embeddings
        itemsize = cache_dtype(model).itemsize
        width = config.num_key_value_heads * config.head_dim
        self._position_bytes = 2 * config.num_hidden_layers * width * itemsize

    def size(self, slots: int | None, max_slots: int, context: int | None) -> CacheSize:
        """Return the given size, with values that are None chosen to fit.

        slots: None = up to `max_slots`.
        context: None = the model's context or, if memory is short, as long as possible; the number
            of slots is reduced before the context falls below 8,192 tokens.

        Raises ResourceError, with values that fit, when the given size does not.
        """
        if self._usable is None:
            return CacheSize(slots or max_slots, min(context or self._longest, self._longest))
        if context is not None:
            context = min(context, self._longest)
            number = slots or min(max_slots, self._most_slots(context, self._usable)) or 1
            if self.bytes(number, context) <= self._usable:
                return CacheSize(number, context)
            raise self._too_large(number, context)
        candidates = [(slots or 1, CACHE_STEP)]
        if slots is None:
            numbers = range(max_slots, 0, -1)
            candidates = [(number, _PREFERRED_CONTEXT) for number in numbers] + candidates
        for number, min_context in candidates:
            longest = min(self._longest, self._longest_context(number, self._usable))
            if longest >= min(self._longest, min_context):
                return CacheSize(number, longest)
        raise self._too_large(slots or 1, min(self._longest, CACHE_STEP))

    def bytes(self, slots: int, context: int) -> int:
        """Return the size of a cache in bytes."""
        return slots * cache_positions(context) * self._position_bytes

    def _longest_context(self, slots: int, usable: int) -> int:
        """Return the longest context that fits; 0 or less when none does."""
        steps = usable // (slots * CACHE_STEP * self._position_bytes)
        return (steps - 1) * CACHE_STEP  # the cache has up to one step more than the context

    def _most_slots(self, context: int, usable: int) -> int:
        return usable // self.bytes(1, context)

    def _too_large(self, slots: int, context: int) -> ResourceError:
        assert self._usable is not None
        usable = int(self._usable * _ADVICE_FRACTION)
        shorter, fewer = self._longest_context(slots, usable), self._most_slots(context, usable)
        advice = []
        if shorter >= CACHE_STEP:
            advice.append(f"--context {shorter}")
        if slots > 1 and fewer:
            advice.append(f"--slots {fewer}")
        longest = self._longest_context(1, usable)
        if slots > 1 and longest >= CACHE_STEP and not advice:
            advice.append(f"--slots 1 --context {longest}")
        return ResourceError(
            f"too little memory on {self._device}: a KV cache of {slots} × {context:,} tokens "
            f"needs {format_memory(self.bytes(slots, context))}, and {format_memory(self._usable)} "
            f"can be used for it; give {' or '.join(advice) or 'a smaller model'}"
        )
