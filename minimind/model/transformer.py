"""The decoder-only transformer: token embedding, layers, final norm, tied output head.

Parameters have the names of Hugging Face's Llama, Qwen3 and GraniteMoeShared classes, so that a
state dict can be saved as it is.

Shapes: B sequences per batch, T new tokens per sequence, S keys (cached and new), D head_dim;
`hidden` is the width of the residual stream, `vocab` the vocabulary size.

Packed batches (several conversations per sequence) use variable-length attention on a GPU in 16
bits (`varlen.py`), and compiled kernels on a CPU in bf16 (`fused.py`). Elsewhere they use a dense
[B, 1, T, T] attention mask. It is simple, and small at the sequence lengths of our recipes: 256 KiB
per sequence at T = 512.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minimind.config.model import ModelConfig, RopeKind
from minimind.model import fused
from minimind.model.attention import Attention
from minimind.model.experts import RoutedExperts, Routing, SharedExperts
from minimind.model.feed_forward import FeedForward
from minimind.model.kv_cache import KVCache
from minimind.model.norm import RMSNorm
from minimind.model.rope import depends_on_length, extend_context, rope_table
from minimind.model.varlen import DTYPES, HEAD_DIMS, SegmentBounds

_INIT_STD = 0.02


class Layer(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream.

    The feed-forward part is one dense layer, or a mixture of experts: routed experts and, in most
    models, shared ones.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.residual_multiplier = config.residual_multiplier
        self.mlp = None if config.num_local_experts else FeedForward(config)
        self.block_sparse_moe = RoutedExperts(config) if config.num_local_experts else None
        self.shared_mlp = SharedExperts(config) if config.shared_intermediate_size else None

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | SegmentBounds | fused.PackedMask | None,
        cache: KVCache | None,
        routing: Routing | None,
    ) -> Tensor:
        """Map [B, T, hidden] to the same shape.

        The other arguments are those of `Attention.forward` and `RoutedExperts.forward`.
        """
        # --8<-- [start:layer]
        attention = self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        x = x + _scaled(attention, self.residual_multiplier)
        feed_forward = self._feed_forward(self.post_attention_layernorm(x), routing)
        return x + _scaled(feed_forward, self.residual_multiplier)
        # --8<-- [end:layer]

    def _feed_forward(self, x: Tensor, routing: Routing | None) -> Tensor:
        if self.block_sparse_moe is None:
            assert self.mlp is not None
            return self.mlp(x)
        # --8<-- [start:shared-experts]
        out = self.block_sparse_moe(x, routing)
        return out if self.shared_mlp is None else out + self.shared_mlp(x)
        # --8<-- [end:shared-experts]


class Decoder(nn.Module):
    """Embedding, layers and final norm: all of the model except the output head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """A causal language model over `config.vocab_size` tokens."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        # The models trained here tie the head to the embedding; imported models may not.
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        # Recompute activations in the backward pass (Chen et al. 2016, section 3).
        self.activation_checkpointing = False
        self._rope: Tensor | None = None
        self._init_weights()

    def _init_weights(self) -> None:
        """Draw normal weights, with a smaller std for residual projections (GPT-2, section 2.3)."""
        residual_std = _INIT_STD * (2 * self.config.num_hidden_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:
                is_residual = name.endswith(
                    ("o_proj.weight", "down_proj.weight", "output_linear.weight")
                )
                nn.init.normal_(parameter, std=residual_std if is_residual else _INIT_STD)

    @property
    def head_weight(self) -> Tensor:
        """Weight of the output head, [vocab, hidden]."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def num_active_parameters(self) -> int:
        """Number of parameters used per token: all except the experts that are not chosen."""
        config = self.config
        total = sum(parameter.numel() for parameter in self.parameters())
        if not config.num_local_experts:
            return total
        num_inactive = config.num_local_experts - config.num_experts_per_tok
        expert_size = 3 * config.hidden_size * config.intermediate_size
        return total - config.num_hidden_layers * num_inactive * expert_size

    def forward(
        self,
        tokens: Tensor,
        *,
        segments: Tensor | None = None,
        bounds: SegmentBounds | None = None,
        cache: KVCache | None = None,
        routing: Routing | None = None,
    ) -> Tensor:
        """Return the hidden states [B, T, hidden] after the final norm: the input of `logits`.

        tokens: [B, T] int64. segments: [B, T], for packed training batches: the number of each
        token's segment (a conversation), non-decreasing along T. Attention and positions restart at
        each segment. bounds: the borders of the same segments, for variable-length attention;
        None = use a dense mask. cache: keys and values of the preceding tokens; those of `tokens`
        are appended. routing: collects the decisions of the routers.
        """
        length = tokens.shape[1]
        past = cache.length if cache is not None else 0
        positions = torch.arange(past, past + length, device=tokens.device)  # [T]
        mask: Tensor | SegmentBounds | fused.PackedMask | None = None
        segment_lengths = None
        if segments is not None:
            assert cache is None, "packed sequences are for training"
            if bounds is not None and self._allows_varlen():
                mask = bounds
            elif not fused.is_enabled(tokens):
                mask = _causal_mask(length, 0, tokens.device)[None, None] & (
                    segments[:, None, :, None] == segments[:, None, None, :]
                )  # [B, 1, T, T]
            positions, segment_lengths = _segment_positions(segments)  # [B, T] each
        if cache is None and fused.is_enabled(tokens):
            indices = torch.arange(length)
            starts = (indices - positions).expand(tokens.shape)  # [B, T]
            mask = fused.packed_mask(starts, self.config.num_attention_heads)
        elif past and length > 1:
            mask = _causal_mask(length, past, tokens.device)[None, None]  # [1, 1, T, S]
        table = self.rope(positions, past + length, segment_lengths)  # [2, (B,) T, D]
        cos, sin = table.unsqueeze(-2)  # [(B,) T, 1, D] each: the same for all heads
        x = _scaled(self.model.embed_tokens(tokens), self.config.embedding_multiplier)
        # x [B, T, hidden]
        # --8<-- [start:all-layers]
        for layer in self.model.layers:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, mask, cache, routing, use_reentrant=False)
            else:
                x = layer(x, cos, sin, mask, cache, routing)
        # Scaled here instead of in `logits`: the losses compute their logits in chunks themselves.
        return _scaled(self.model.norm(x), 1 / self.config.logits_scaling)
        # --8<-- [end:all-layers]

    def _allows_varlen(self) -> bool:
        """Return True if variable-length attention takes this compute dtype and head_dim."""
        kind, dtype = self.head_weight.device.type, self.head_weight.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        return dtype in DTYPES and self.config.head_dim in HEAD_DIMS

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the output head: [..., hidden] -> [..., vocab]."""
        return F.linear(hidden, self.head_weight)

    def extend_context(self, context: int, kind: RopeKind | None = None) -> None:
        """Extend the context to `context` tokens by RoPE scaling, in place.

        kind: None selects `rope.BEST_SCALING`. Does nothing if `context` is not larger than the
        model's own. Raises ModelError when the context has been extended before.
        """
        self.config, self._rope = extend_context(self.config, context, kind), None

    def rope(self, positions: Tensor, length: int, lengths: Tensor | None = None) -> Tensor:
        """Return the cosines and sines [2, ..., D] of the rotary embedding at `positions` [...].

        length: tokens of the sequence so far. lengths: [...], tokens of each position's own
        segment in a packed sequence. Only dynamic scaling depends on them. Otherwise one cached
        table is indexed. It grows with the length in use, because the context that config.json
        declares may be huge.
        """
        config, device = self.config, positions.device
        if depends_on_length(config, length):
            return rope_table(config, positions, length if lengths is None else lengths)
        if self._rope is None or self._rope.device != device or self._rope.shape[1] < length:
            size = min(max(512, 1 << (length - 1).bit_length()), config.max_position_embeddings)
            with torch.inference_mode(False):  # a later training step may use the same table
                self._rope = rope_table(config, torch.arange(size), length).to(device)
        return self._rope[:, positions]


def _scaled(x: Tensor, factor: float) -> Tensor:
    """Multiply by `factor`; a factor of 1, the usual case, costs nothing."""
    return x if factor == 1.0 else x * factor


def _causal_mask(length: int, past: int, device: torch.device) -> Tensor:
    """Mask [length, past + length] that is True where a query may attend to a key."""
    return torch.ones(length, past + length, dtype=torch.bool, device=device).tril(past)


def _segment_positions(segments: Tensor) -> tuple[Tensor, Tensor]:
    """Return each token's position within its segment and that segment's length, both [B, T]."""
    length = segments.shape[1]
    indices = torch.arange(length, device=segments.device).expand_as(segments)  # [B, T]
    borders = segments[:, 1:] != segments[:, :-1]  # [B, T - 1]
    # The start (inclusive) and end (exclusive) of each token's segment, [B, T] each.
    starts = torch.where(F.pad(borders, (1, 0), value=True), indices, 0).cummax(dim=1).values
    ends = torch.where(F.pad(borders, (0, 1), value=True), indices + 1, length)
    ends = ends.flip(1).cummin(dim=1).values.flip(1)
    return indices - starts, ends - starts
