"""Keys and values of what a model has already read, so that decoding reads each token once."""

import torch
from torch import Tensor

from minimind.config.model import ModelConfig


class KVCache:
    """Room for `max_length` tokens of `batch` sequences of equal length, allocated once.

    keys, values: [layers, batch, kv_heads, max_length, head_dim].
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        max_length: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        heads, width = config.num_key_value_heads, config.head_dim
        shape = (config.num_hidden_layers, batch, heads, max_length, width)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store [batch, kv_heads, T, head_dim] of one layer; all there is of that layer so far.

        The length moves on when the last layer has stored its part.
        """
        end = self.length + keys.shape[2]
        assert end <= self.keys.shape[3], "the cache is full"
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        if layer == self.keys.shape[0] - 1:
            self.length = end
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def keep(self, rows: Tensor) -> None:
        """Go on with the sequences `rows` alone."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
