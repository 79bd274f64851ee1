"""Grouped-query causal self-attention (Vaswani et al. 2017; Ainslie et al. 2023).

Shapes: B sequences, T queries (new tokens), S keys (cached and new tokens), H query heads,
K key/value heads, D head_dim; H is a multiple of K. During training S = T.

`scaled_dot_product_attention` accepts any boolean mask but then cannot use FlashAttention. Packed
sequences therefore use variable-length attention where it works: `varlen.py`. On a CPU in bf16,
compiled kernels compute the attention of all sequences without a cache: `fused.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind.config.model import ModelConfig
from minimind.model import fused
from minimind.model.kv_cache import KVCache
from minimind.model.linear import Linear
from minimind.model.norm import RMSNorm
from minimind.model.rope import apply_rotary
from minimind.model.varlen import SegmentBounds, varlen_attention

_BLOCKWISE_MAX_LENGTH = 256  # longest sequences for which `_blockwise_attention` is used
_QUERY_BLOCK = 128  # queries per block; scores of keys after the block are not computed


class Attention(nn.Module):
    """Projections, optional QK-norm, rotary embedding and scaled dot-product attention."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.scale = config.attention_multiplier  # factor on scores; None = 1 / sqrt(head_dim)
        query_width = config.num_attention_heads * config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, query_width)
        self.k_proj = Linear(config.hidden_size, key_width)
        self.v_proj = Linear(config.hidden_size, key_width)
        self.o_proj = Linear(query_width, config.hidden_size)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | SegmentBounds | fused.PackedMask | None,
        cache: KVCache | None,
    ) -> Tensor:
        """Attend from x to itself and to the cached tokens: [B, T, hidden] -> [B, T, hidden].

        cos, sin: [B or 1, T, 1, D], or without the batch dimension. mask: [B or 1, 1, T, S], True
        where a query may attend to a key; SegmentBounds or PackedMask = causal within segments;
        None = causal.
        """
        # --8<-- [start:projections]
        heads = (*x.shape[:2], -1, self.head_dim)
        # q [B, T, H, D]; k, v [B, T, K, D]
        q, k, v = (proj(x).view(heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        # --8<-- [end:projections]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if isinstance(mask, fused.PackedMask):
            scale = self.scale or self.head_dim**-0.5
            out = fused.attention(q, k, v, cos.squeeze(-2), sin.squeeze(-2), mask, scale)
            return self.o_proj(out)
        q, k = apply_rotary(q, cos, sin).to(v.dtype), apply_rotary(k, cos, sin).to(v.dtype)
        if isinstance(mask, SegmentBounds):
            return self.o_proj(varlen_attention(q, k, v, mask, self.scale).flatten(2))
        # q [B, H, T, D]; k, v [B, K, T, D]
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # [B, K, S, D]
        is_decoding = bool(q.shape[2] == 1)  # bool: symbolic while `torch.export` traces
        if not is_decoding:  # at T = 1, repeating k and v would cost more than attention itself
            # --8<-- [start:gqa]
            group_size = q.shape[1] // k.shape[1]  # query heads per key/value head
            k, v = k.repeat_interleave(group_size, dim=1), v.repeat_interleave(group_size, dim=1)
            # --8<-- [end:gqa]
            # k, v [B, H, S, D]
        trains_on_cpu = x.device.type == "cpu" and torch.is_grad_enabled()
        if trains_on_cpu and cache is None and 1 < q.shape[2] <= _BLOCKWISE_MAX_LENGTH:
            out = _blockwise_attention(q, k, v, mask, self.scale or self.head_dim**-0.5)
        else:
            out = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=mask is None and not is_decoding,
                scale=self.scale,
                enable_gqa=is_decoding,
            )
        out = out.transpose(1, 2).flatten(2)  # [B, H, T, D] -> [B, T, H * D]
        return self.o_proj(out)


def _blockwise_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Compute softmax(q k^T * scale) v in blocks of queries.

    q, k, v and the result: [B, H, T, D]. mask: [B or 1, 1, T, T]; no query attends to later keys.
    For short training sequences on a CPU this is faster than PyTorch's fused kernel:
    benchmarks/records/cpu-kernels.md.
    """
    length = q.shape[2]
    if mask is None:
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=q.device).tril()
    masked_out, q, lowest = ~mask, q * scale, torch.finfo(q.dtype).min
    # --8<-- [start:attention]
    blocks = []
    for start in range(0, length, _QUERY_BLOCK):
        block = slice(start, min(start + _QUERY_BLOCK, length))
        scores = q[:, :, block] @ k[:, :, : block.stop].transpose(-1, -2)  # [B, H, block, keys]
        scores = scores.masked_fill_(masked_out[:, :, block, : block.stop], lowest)
        blocks.append(scores.softmax(-1, dtype=v.dtype) @ v[:, :, : block.stop])
    return torch.cat(blocks, dim=2)
    # --8<-- [end:attention]
