"""Grouped-query causal self-attention (Vaswani et al. 2017; Ainslie et al. 2023)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind.config.model import ModelConfig
from minimind.model.kv_cache import KVCache
from minimind.model.norm import RMSNorm
from minimind.model.rope import rotate

_PLAIN_UP_TO = 256  # tokens a window, on a CPU
_QUERIES = 128  # at once on a CPU: what lies in the future is not computed


class Attention(nn.Module):
    """B sequences, T tokens, H query heads, K key/value heads, D wide each."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.scale = config.attention_multiplier  # of the scores; None = 1 / sqrt(head_dim)
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        """x: [B, T, hidden]; mask: [B or 1, 1, T, S] True where a query may look, None = causal."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (proj(x).view(heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        one = q.shape[2] == 1  # while decoding: copies would cost more than the attention itself
        if not one:
            groups = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        trains_on_cpu = x.device.type == "cpu" and torch.is_grad_enabled()
        if trains_on_cpu and 1 < q.shape[2] <= _PLAIN_UP_TO:
            out = _plain_attention(q, k, v, mask, self.scale or self.head_dim**-0.5)
        else:
            out = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=mask is None and not one,
                scale=self.scale,
                enable_gqa=one,
            )
        return self.o_proj(out.transpose(1, 2).flatten(2))


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The textbook formula, some queries at a time against the keys up to theirs.

    For short training windows on a CPU that is faster than torch's fused kernel;
    benchmarks/records/cpu-kernels.md has the figures.
    """
    length = q.shape[2]
    if mask is None:
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=q.device).tril()
    hidden, q, least = ~mask, q * scale, torch.finfo(q.dtype).min
    parts = []
    for start in range(0, length, _QUERIES):
        here = slice(start, min(start + _QUERIES, length))
        scores = q[:, :, here] @ k[:, :, : here.stop].transpose(-1, -2)
        scores = scores.masked_fill_(hidden[:, :, here, : here.stop], least)
        parts.append(scores.softmax(-1, dtype=v.dtype) @ v[:, :, : here.stop])
    return torch.cat(parts, dim=2)
