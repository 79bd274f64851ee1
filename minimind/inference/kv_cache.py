"""KV cache: the keys and values of all slots.

L layers, S slots, K key/value heads, P positions per slot, D head dimension.
"""

import math
import mmap

import torch
from torch import Tensor

from minimind.errors import ResourceError
from minimind.model import ModelConfig
from minimind.units import format_memory

CACHE_STEP = 64  # attention spans a multiple of this many positions


class KVCache:
    """One tensor with room for `slots` sequences of `context` tokens.

    data: [L, 2, S, K, P, D], keys and values.
    """

    def __init__(
        self,
        config: ModelConfig,
        slots: int,
        context: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Raise ResourceError when memory is too short."""
        shape = (
            config.num_hidden_layers,
            2,
            slots,
            config.num_key_value_heads,
            cache_positions(context),
            config.head_dim,
        )
        try:
            if device.type == "cpu":  # pages that are never written to take no memory
                size = math.prod(shape) * dtype.itemsize
                pages = mmap.mmap(-1, size, access=mmap.ACCESS_COPY)
                self.data = torch.frombuffer(pages, dtype=dtype).view(shape)
            else:
                self.data = torch.zeros(shape, dtype=dtype, device=device)
        except (MemoryError, OSError, OverflowError, torch.OutOfMemoryError) as error:
            size = math.prod(shape) * dtype.itemsize
            raise ResourceError(
                f"too little memory on {device}: a KV cache of {slots} × {context:,} tokens needs "
                f"{format_memory(size)}; give --context {max(context // 2, 1)} or less"
            ) from error
        # [L, 2, S, K, P, D] -> L views [S, P, 2, K, D]: indexed by (slots, positions)
        self._kv_slots = self.data.permute(0, 2, 4, 1, 3, 5).unbind()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of keys and values."""
        return self.data.dtype

    @property
    def positions(self) -> int:
        """Positions per slot."""
        return self.data.shape[-2]

    def write(self, layer: int, where: tuple[Tensor, Tensor], kv: Tensor) -> None:
        """Store keys and values [N, 2, K, D] of N tokens; where: their slots and positions, [N]."""
        self._kv_slots[layer][where] = kv.to(self.dtype)

    def kv_views(self, slots: slice, positions: int) -> list[tuple[Tensor, Tensor]]:
        """Return views [slots * K, positions, D] of the keys and values of each layer."""
        part = self.data[:, :, slots, :, :positions].flatten(2, 3)  # [L, 2, slots * K, P, D]
        return list(zip(*part.unbind(1), strict=True))

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a slot to another slot."""
        self.data[:, :, target, :, :length] = self.data[:, :, source, :, :length]

    def clear(self, slot: int, length: int) -> None:
        """Zero the first `length` positions of a slot.

        Values that are not finite would damage the slot's next sequence: masked positions have
        weight 0, and 0 * inf is NaN. Further positions are left alone, since writing to them would
        commit their memory.
        """
        self.data[:, :, slot, :, :length] = 0


def cache_positions(context: int) -> int:
    """Return the positions per slot: a multiple of CACHE_STEP, at least one beyond the context.

    CUDA graphs write the tokens of unused rows to the position after the context.
    """
    return (context // CACHE_STEP + 1) * CACHE_STEP
