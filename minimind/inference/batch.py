"""A model's forward pass for many texts at once: packed weights and one cache for all.

N rows (a row is one token of one text), H query heads, K key/value heads, D wide each; a slot is
the place of one text in the cache.

What a text's row comes to does not depend on the other rows. Every product of matrices is one
whose rows are computed alike in a batch of any size: oneDNN's with weights packed beforehand is
from two rows on (a single one takes another path, so it gets company), and attention is one small
product a text, padded with words that weigh nothing. tests/inference/test_batch.py holds this
to the bit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.model import Transformer
from minimind.model.feed_forward import FeedForward

CHUNK = 64  # tokens of a prompt that are read together; a prefix is shared in whole chunks
_STEP = 64  # attention spans whole steps of this many positions

Linear = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Part:
    """Tokens of one text that go through the model together: slot, position of the first."""

    slot: int
    start: int
    tokens: Sequence[int]


@dataclass(frozen=True)
class _Layer:
    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Linear
    feed_norm: Tensor
    feed: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Span:
    """Rows that attend together: those of one part, or the single tokens of neighbouring slots."""

    rows: slice
    slots: slice
    bias: Tensor  # [slots * K, H / K * tokens, positions]: 0 where a row may look, else -inf


class BatchedModel:
    """The weights of a model, packed, with room for `slots` texts of `context` tokens."""

    def __init__(self, model: Transformer, slots: int, context: int) -> None:
        config = model.config
        weight = model.head_weight
        self.device, self.dtype = weight.device, weight.dtype
        self.slots, self.context, self.vocab_size = slots, context, config.vocab_size
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._head_dim, self._eps = config.head_dim, config.rms_norm_eps
        self._model = model
        self._embedding = model.model.embed_tokens.weight.detach()
        self._norm = model.model.norm.weight.detach().float()
        self._head = _linear(weight.detach())
        self._layers = [self._pack(layer) for layer in model.model.layers]
        # On a CPU float32 attention is the faster one, and pages of zeros cost nothing until used.
        self._cache_dtype = torch.float32 if self.device.type == "cpu" else self.dtype
        shape = (
            config.num_hidden_layers,
            slots,
            2 * self._kv_heads,  # keys, then values
            -(-context // _STEP) * _STEP,
            config.head_dim,
        )
        if self.device.type == "cpu":
            self._cache = torch.from_numpy(numpy.zeros(shape, dtype=numpy.float32))
        else:
            self._cache = torch.zeros(shape, dtype=self._cache_dtype, device=self.device)

    def _pack(self, layer: torch.nn.Module) -> _Layer:
        attention, feed = layer.self_attn, layer.mlp
        qkv = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        return _Layer(
            input_norm=layer.input_layernorm.weight.detach().float(),
            qkv=_linear(qkv.detach()),
            q_norm=None if attention.q_norm is None else attention.q_norm.weight.detach().float(),
            k_norm=None if attention.k_norm is None else attention.k_norm.weight.detach().float(),
            out=_linear(attention.o_proj.weight.detach()),
            feed_norm=layer.post_attention_layernorm.weight.detach().float(),
            feed=_swiglu(feed),
        )

    @torch.inference_mode()
    def forward(self, singles: Sequence[Part], chunks: Sequence[Part]) -> Tensor:
        """Logits [parts, vocab] float32 after the last token of each part, singles first.

        singles: one token each, in the order of their slots. chunks: up to CHUNK tokens each,
        begun at a multiple of CHUNK.
        """
        parts = [*singles, *chunks]
        tokens = [token for part in parts for token in part.tokens]
        positions = [p for part in parts for p in range(part.start, part.start + len(part.tokens))]
        slots = [part.slot for part in parts for _ in part.tokens]
        rows = len(tokens)
        if rows == 1:
            tokens = tokens * 2
        spans = self._spans(singles, chunks)
        where = torch.tensor([slots, positions], device=self.device)
        cos, sin = self._rope(where[1])
        x = self._embedding[torch.tensor(tokens, device=self.device)].float()
        for number, layer in enumerate(self._layers):
            normed = self._normed(x, layer.input_norm)
            mixed = self._attend(number, layer, normed, rows, where, cos, sin, spans)
            x += layer.out(mixed)
            x += layer.feed(self._normed(x, layer.feed_norm))
        ends, last = [], -1
        for part in parts:
            last += len(part.tokens)
            ends.append(last)
        x = x[torch.tensor(ends if len(ends) > 1 else ends * 2, device=self.device)]
        return self._head(self._normed(x, self._norm))[: len(ends)].float()

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self._eps).to(self.dtype)

    def _rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        table = self._model._rope_table(self.context, self.device)
        cos, sin = table[:, positions].unsqueeze(-2)
        half = self._head_dim // 2
        return cos, torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)

    def _attend(
        self,
        number: int,
        layer: _Layer,
        normed: Tensor,
        rows: int,
        where: Tensor,
        cos: Tensor,
        sin: Tensor,
        spans: Sequence[_Span],
    ) -> Tensor:
        """[N, hidden] -> [N, H * D], what each row finds in its text so far."""
        width, queries = self._head_dim, self._heads
        qkv = layer.qkv(normed)[:rows].view(rows, -1, width).float()
        turned = qkv[:, : queries + self._kv_heads]
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = turned[:, :queries], turned[:, queries:]
            q = F.rms_norm(q, (width,), layer.q_norm, self._eps)
            k = F.rms_norm(k, (width,), layer.k_norm, self._eps)
            turned = torch.cat((q, k), dim=1)
        turned = torch.addcmul(turned * cos, turned.roll(width // 2, -1), sin)
        cache = self._cache[number]
        new = torch.cat((turned[:, queries:], qkv[:, queries + self._kv_heads :]), dim=1)
        cache[where[0], :, where[1]] = new.to(self._cache_dtype)
        q = turned[:, :queries].to(self._cache_dtype)
        mixed = torch.empty(len(normed), queries * width, dtype=self.dtype, device=self.device)
        for span in spans:
            mixed[span.rows] = self._look(q[span.rows], cache[span.slots], span.bias)
        return mixed

    def _look(self, q: Tensor, cache: Tensor, bias: Tensor) -> Tensor:
        """Attention of q [rows, H, D] to cache [slots, 2K, positions, D] -> [rows, H * D]."""
        slots, heads, width = len(cache), self._kv_heads, self._head_dim
        length, groups = bias.shape[-1], self._heads // heads
        keys = cache[:, :heads, :length].flatten(0, 1)
        values = cache[:, heads:, :length].flatten(0, 1)
        q = q.view(slots, -1, heads, groups, width).permute(0, 2, 3, 1, 4)
        q = q.reshape(slots * heads, -1, width)
        scores = torch.baddbmm(bias, q, keys.transpose(1, 2), alpha=width**-0.5)
        out = torch.bmm(scores.softmax(-1), values)
        out = out.view(slots, heads, groups, -1, width).permute(0, 3, 1, 2, 4)
        return out.reshape(-1, self._heads * width)

    def _spans(self, singles: Sequence[Part], chunks: Sequence[Part]) -> list[_Span]:
        spans, groups, row = [], self._heads // self._kv_heads, 0
        for run in _neighbours(singles):
            lengths = torch.tensor([part.start + 1 for part in run], device=self.device)
            bias = self._bias(lengths, max(part.start + 1 for part in run))
            bias = bias.repeat_interleave(self._kv_heads, 0)[:, None].expand(-1, groups, -1)
            slots = slice(run[0].slot, run[-1].slot + 1)
            spans.append(_Span(slice(row, row + len(run)), slots, bias))
            row += len(run)
        for part in chunks:
            end = part.start + len(part.tokens)
            lengths = torch.arange(part.start + 1, end + 1, device=self.device)
            bias = self._bias(lengths, end).repeat(groups, 1).expand(self._kv_heads, -1, -1)
            slots = slice(part.slot, part.slot + 1)
            spans.append(_Span(slice(row, row + len(part.tokens)), slots, bias))
            row += len(part.tokens)
        return spans

    def _bias(self, lengths: Tensor, longest: int) -> Tensor:
        """[rows, positions]: 0 where a row of a text of so many tokens looks, else -inf."""
        positions = torch.arange(-(-longest // _STEP) * _STEP, device=self.device)
        bias = torch.zeros(len(lengths), len(positions), device=self.device)
        bias.masked_fill_(positions >= lengths[:, None], -torch.inf)
        return bias.to(self._cache_dtype)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Give the slot `target` what the slot `source` holds of its first `length` tokens."""
        self._cache[:, target, :, :length] = self._cache[:, source, :, :length]

    def wipe(self, slot: int) -> None:
        """Forget a slot: bad numbers would spoil the next text, even where it does not look."""
        self._cache[:, slot] = 0


def _neighbours(singles: Sequence[Part]) -> list[list[Part]]:
    """Runs of slots that follow each other."""
    runs: list[list[Part]] = []
    for part in singles:
        if runs and runs[-1][-1].slot + 1 == part.slot:
            runs[-1].append(part)
        else:
            runs.append([part])
    return runs


def _linear(weight: Tensor) -> Linear:
    """x [N, in] -> [N, out]."""
    if weight.device.type == "cpu" and torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
        product = torch.ops.mkldnn._linear_pointwise.default
        return lambda x: product(x, packed, None, "none", [], "")
    return lambda x: F.linear(x, weight)


def _swiglu(feed: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    if not isinstance(feed, FeedForward):
        return feed
    inner = len(feed.gate_proj.weight)
    gate_up = _linear(torch.cat([feed.gate_proj.weight, feed.up_proj.weight]).detach())
    down = _linear(feed.down_proj.weight.detach())

    def forward(x: Tensor) -> Tensor:
        both = gate_up(x)
        return down(F.silu(both[:, :inner]).mul_(both[:, inner:]))

    return forward
