"""KV cache: keys and values of past tokens, so that decoding computes each token only once."""

import torch
from torch import Tensor

from minimind.config.model import ModelConfig


class KVCache:
    """Keys and values of up to `max_length` tokens of `batch` sequences of equal length.

    Shapes: L layers, B sequences, K key/value heads, S positions, D head_dim; `keys` and `values`
    are [L, B, K, S, D], allocated once for S = max_length. The inference engine, whose sequences
    differ in length, has its own cache: `inference/kv_cache.py`.
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
        """Store new keys and values [B, K, T, D] of one layer.

        Returns all keys and values of that layer so far, [B, K, length, D] each.
        `length` advances after the last layer.
        """
        # --8<-- [start:append]
        end = self.length + keys.shape[2]
        assert end <= self.keys.shape[3], "the KV cache is full"
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        if layer == self.keys.shape[0] - 1:
            self.length = end
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]
        # --8<-- [end:append]
