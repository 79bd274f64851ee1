"""The decoder: token embedding, layers of attention and feed-forward, and a tied head.

Parameters are named as Hugging Face's Llama, Qwen3 and GraniteMoeShared classes name them, so that
what is in memory is what is on disk.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minimind.config.model import ModelConfig, RopeKind
from minimind.model.attention import Attention
from minimind.model.experts import RoutedExperts, Routing, SharedExperts
from minimind.model.feed_forward import FeedForward
from minimind.model.kv_cache import KVCache
from minimind.model.norm import RMSNorm
from minimind.model.rope import depends_on_length, extend_context, rope_table

_INIT_STD = 0.02


class Layer(nn.Module):
    """Attention, then feed-forward, each behind a norm and added to the residual stream.

    Feed-forward is one for all tokens, or routed experts and as a rule shared ones.
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
        mask: Tensor | None,
        cache: KVCache | None,
        routing: Routing | None,
    ) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        x = x + _times(attended, self.residual_multiplier)
        fed = self._feed_forward(self.post_attention_layernorm(x), routing)
        return x + _times(fed, self.residual_multiplier)

    def _feed_forward(self, x: Tensor, routing: Routing | None) -> Tensor:
        if self.block_sparse_moe is None:
            assert self.mlp is not None
            return self.mlp(x)
        out = self.block_sparse_moe(x, routing)
        return out if self.shared_mlp is None else out + self.shared_mlp(x)


class Decoder(nn.Module):
    """Everything below the head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """A language model over `config.vocab_size` tokens. B sequences of T tokens."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        # Untied heads come with models made elsewhere; ours are tied.
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        self.activation_checkpointing = False  # in training; Chen et al. 2016, section 3
        self._rope: Tensor | None = None
        self._initialise()

    def _initialise(self) -> None:
        """Normal weights; those that write to the residual stream smaller (GPT-2, section 2.3)."""
        shrink = (2 * self.config.num_hidden_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:
                writes = name.endswith(
                    ("o_proj.weight", "down_proj.weight", "output_linear.weight")
                )
                nn.init.normal_(parameter, std=_INIT_STD * (shrink if writes else 1.0))

    @property
    def head_weight(self) -> Tensor:
        """[vocab, hidden]."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def num_active_parameters(self) -> int:
        """Parameters that take part in each token: of the routed experts, those that it uses."""
        config = self.config
        everything = sum(parameter.numel() for parameter in self.parameters())
        if not config.num_local_experts:
            return everything
        idle = config.num_local_experts - config.num_experts_per_tok
        of_an_expert = 3 * config.hidden_size * config.intermediate_size
        return everything - config.num_hidden_layers * idle * of_an_expert

    def forward(
        self,
        tokens: Tensor,
        *,
        segments: Tensor | None = None,
        cache: KVCache | None = None,
        routing: Routing | None = None,
    ) -> Tensor:
        """Hidden states [B, T, hidden] after the last norm, ready for the head.

        tokens: [B, T] int64. segments: [B, T], a number for each conversation packed into
        a window, rising along it: attention and positions stop at its borders. cache: what was
        read before; `tokens` go on from there. routing: collects what the routers decide.
        """
        past = cache.length if cache is not None else 0
        mask, positions = None, torch.arange(past, past + tokens.shape[1], device=tokens.device)
        lengths = None
        if segments is not None:
            assert cache is None, "packed windows are for training"
            mask = _causal_mask(tokens.shape[1], 0, tokens.device)[None, None] & (
                segments[:, None, :, None] == segments[:, None, None, :]
            )
            positions, lengths = _places_in(segments)
        elif past and tokens.shape[1] > 1:
            mask = _causal_mask(tokens.shape[1], past, tokens.device)[None, None]
        cos, sin = self.rope(positions, past + tokens.shape[1], lengths).unsqueeze(-2)
        x = _times(self.model.embed_tokens(tokens), self.config.embedding_multiplier)
        for layer in self.model.layers:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, mask, cache, routing, use_reentrant=False)
            else:
                x = layer(x, cos, sin, mask, cache, routing)
        # Scaled here and not in the logits, which losses make for themselves, a few at a time.
        return _times(self.model.norm(x), 1 / self.config.logits_scaling)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [..., vocab]."""
        return F.linear(hidden, self.head_weight)

    def extend_context(self, context: int, kind: RopeKind | None = None) -> None:
        """Read `context` tokens from now on. Raises ModelError when the model is stretched already.

        kind: None = the best that was measured. Within the model's own context nothing changes.
        """
        self.config, self._rope = extend_context(self.config, context, kind), None

    def rope(self, positions: Tensor, length: int, lengths: Tensor | None = None) -> Tensor:
        """Cosines and sines [2, ..., head_dim] at `positions` of texts of `length` tokens so far.

        lengths: [...], of the text that each position is in, where several make up `length`.
        A table serves for as much of the context as is used: config.json may promise any length.
        """
        config, device = self.config, positions.device
        if depends_on_length(config, length):
            return rope_table(config, positions, length if lengths is None else lengths)
        if self._rope is None or self._rope.device != device or self._rope.shape[1] < length:
            size = min(max(512, 1 << (length - 1).bit_length()), config.max_position_embeddings)
            with torch.inference_mode(False):  # training may go on with it
                self._rope = rope_table(config, torch.arange(size), length).to(device)
        return self._rope[:, positions]


def _times(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1.0 else x * factor


def _causal_mask(length: int, past: int, device: torch.device) -> Tensor:
    """[length, past + length], True where a query may look."""
    return torch.ones(length, past + length, dtype=torch.bool, device=device).tril(past)


def _places_in(segments: Tensor) -> tuple[Tensor, Tensor]:
    """[B, T] -> each token's position in its segment, and how long that is, each [B, T]."""
    width = segments.shape[1]
    places = torch.arange(width, device=segments.device).expand_as(segments)
    borders = segments[:, 1:] != segments[:, :-1]
    starts = torch.where(F.pad(borders, (1, 0), value=True), places, 0).cummax(dim=1).values
    ends = torch.where(F.pad(borders, (0, 1), value=True), places + 1, width)
    return places - starts, ends.flip(1).cummin(dim=1).values.flip(1) - starts
