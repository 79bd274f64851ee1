"""A model's forward pass for many texts at once: packed weights and one cache for all.

N rows (a row is one token of one text), H query heads, K key/value heads, D wide each; a slot is
the place of one text in the cache.

On a CPU the bits of a row do not depend on the other rows: matrix products are computed in batches
whose size does not change the order of summation on this processor (`products.py`), and attention
is one small product per text, padded with positions of weight zero. Where a trial finds that even
so the bits change, attention is computed text by text, and a product without any batch size that
holds makes `batch_invariant` false. tests/inference/test_batch.py holds this to the bit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind.errors import ResourceError
from minimind.inference.products import Linear, Packer, attends_alike
from minimind.model import Transformer
from minimind.model.experts import RoutedExperts, moe_reference
from minimind.model.lora import LoRALinear
from minimind.model.norm import RMSNorm, rms_norm_cpu
from minimind.model.rope import depends_on_length, rope_table
from minimind.model.transformer import Layer

CHUNK = 64  # tokens of a prompt that are read together; a prefix is shared in whole chunks
CACHE_STEP = 64  # attention spans whole steps of this many positions


@dataclass(frozen=True)
class Part:
    """Tokens of one text that go through the model together: slot, position of the first.

    text_length: as far as the text is known, for positions that are scaled by it; 0 = to here.
    wanted: of how many of the last tokens logits are asked for.
    """

    slot: int
    start: int
    tokens: Sequence[int]
    text_length: int = 0
    wanted: int = 1

    def __post_init__(self) -> None:
        if not self.text_length:
            object.__setattr__(self, "text_length", self.start + len(self.tokens))


@dataclass(frozen=True)
class _Layer:
    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Linear
    feed_norm: Tensor
    feed: Linear


@dataclass(frozen=True)
class _Span:
    """Rows that attend together: those of one part, or the single tokens of neighbouring slots."""

    rows: slice
    slots: slice
    bias: Tensor  # [slots * K, H / K * tokens, positions]: 0 where a row may look, else -inf


class BatchedModel:
    """The weights of a model, packed, with room for `slots` texts of `context` tokens.

    Of the model itself nothing is kept but the embedding. int8: matrices as 8-bit integers with
    a scale for each output, on a CPU. threads: of the thread that will call it; None = as many as
    this one has. batch_invariant: whether a text gets the same bits whoever is beside it. Raises
    ResourceError when the room is more than the machine has.
    """

    def __init__(
        self,
        model: Transformer,
        slots: int,
        context: int,
        *,
        int8: bool = False,
        threads: int | None = None,
    ) -> None:
        config, head = model.config, model.head_weight.detach()
        self.device, self.dtype = head.device, head.dtype
        self.slots, self.context, self.vocab_size = slots, context, config.vocab_size
        self._config = config
        self._embedding = model.model.embed_tokens.weight.detach()
        self._norm = _norm_weight(model.model.norm)
        threads = threads or torch.get_num_threads()
        pack = Packer(self.device, int8=int8, threads=threads)
        self._head = pack(head)
        self._layers = [_pack_layer(layer, pack, slots) for layer in model.model.layers]
        self._least_rows = pack.least_rows
        self._attends_apart = self.device.type == "cpu" and not attends_alike(
            self._look,
            config.num_key_value_heads,
            config.num_attention_heads // config.num_key_value_heads,
            config.head_dim,
            slots=slots,
            step=CACHE_STEP,
            threads=threads,
        )
        self.batch_invariant = pack.batch_invariant
        self._cache = self._allocate()
        self._places = self._cache.permute(0, 2, 4, 1, 3, 5).unbind()  # [slots, positions, 2, K, D]
        self._turns = torch.empty(2, 0, config.head_dim, device=self.device)

    @property
    def promise(self) -> str:
        """A statement for users on `batch_invariant`."""
        if self.batch_invariant:
            return "an answer does not depend on other requests, to the bit"
        return "other requests may change the last bits of an answer"

    def _allocate(self) -> Tensor:
        """[layers, 2, slots, K, positions, D]: keys, values; on a CPU in float32, the faster one.

        On a CPU, pages that were never written to take no memory.
        """
        config = self._config
        shape = (
            config.num_hidden_layers,
            2,
            self.slots,
            config.num_key_value_heads,
            cache_positions(self.context),
            config.head_dim,
        )
        try:
            if self.device.type == "cpu":
                return torch.from_numpy(numpy.zeros(shape, dtype=numpy.float32))
            return torch.zeros(shape, dtype=self.dtype, device=self.device)
        except (MemoryError, ValueError, torch.OutOfMemoryError) as error:
            size = math.prod(shape) * (4 if self.device.type == "cpu" else self.dtype.itemsize)
            raise ResourceError(
                f"too little memory on {self.device}: a KV cache of {self.slots} × "
                f"{self.context:,} tokens needs {size / 1e9:.1f} GB; give --context "
                f"{max(self.context // 2, 1)} or less"
            ) from error

    @torch.inference_mode()
    def forward(self, singles: Sequence[Part], chunks: Sequence[Part]) -> Tensor:
        """Logits [wanted, vocab] float32, those of each part in its order, singles first.

        singles: one token each, in the order of their slots. chunks: up to CHUNK tokens each. No
        two parts are of the same places of a slot; of parts that follow each other, the later one
        sees the earlier one.
        """
        parts = [*singles, *chunks]
        tokens = [token for part in parts for token in part.tokens]
        positions = [p for part in parts for p in range(part.start, part.start + len(part.tokens))]
        slots = [part.slot for part in parts for _ in part.tokens]
        ends = accumulate(len(part.tokens) for part in parts)
        wanted = [
            row
            for part, end in zip(parts, ends, strict=True)
            for row in range(end - part.wanted, end)
        ]
        rows = len(tokens)
        where = torch.tensor([slots, positions], device=self.device)
        spans = self._spans(singles, chunks)
        x = self._embedded(torch.tensor(self._company(tokens), device=self.device))
        some = None
        if len(wanted) < rows:
            some = torch.tensor(self._company(wanted or [0]), device=self.device)
        x = self._through_layers(x, rows, where, self._angles(parts), spans, some)
        return self._logits(x)[: len(wanted)]

    @torch.inference_mode()
    def step(self, tokens: Tensor, positions: Tensor, span: int) -> Tensor:
        """Logits [n, vocab] float32 after a token [n] each at positions [n] of the first n slots.

        Nothing in it waits for the device, and shapes depend on n and span alone, so that it can
        be a CUDA graph. span: positions that are looked at, as many as the longest text has at
        the least. A slot without a token gets any, at the position `context`, where no text is.
        """
        assert self._turns.shape[1] > self.context, "see prepare_steps"
        rows, heads = len(tokens), self._config.num_key_value_heads
        where = torch.stack((torch.arange(rows, device=self.device), positions))
        bias = self._bias(positions + 1, span).repeat_interleave(heads, 0)[:, None]
        groups = self._config.num_attention_heads // heads
        spans = [_Span(slice(0, rows), slice(0, rows), bias.expand(-1, groups, -1))]
        x = self._embedded(F.pad(tokens, (0, max(0, self._least_rows - rows))))
        x = self._through_layers(x, rows, where, self._turns[:, positions], spans)
        return self._logits(x)[:rows]

    def prepare_steps(self) -> None:
        """Make what `step` needs and must not make itself."""
        self._grow_turns(self.context + 1)

    @property
    def positions(self) -> int:
        """How many the cache has."""
        return self._cache.shape[-2]

    def _embedded(self, tokens: Tensor) -> Tensor:
        x = self._embedding[tokens].float()
        if self._config.embedding_multiplier != 1:
            x *= self._config.embedding_multiplier
        return x

    def _through_layers(
        self,
        x: Tensor,
        rows: int,
        where: Tensor,
        angles: Tensor,
        spans: Sequence[_Span],
        wanted: Tensor | None = None,
    ) -> Tensor:
        """x [at least rows, hidden] -> the same; where: slots and positions [2, rows] of its rows.

        wanted: the numbers of the rows that are to come out, where it is not all of them.
        """
        cos, sin = angles.unsqueeze(-2)
        places = tuple(where)
        seen = [self._seen(span) for span in spans]
        scale = self._config.residual_multiplier
        for number, layer in enumerate(self._layers):
            normed = self._normed(x, layer.input_norm)
            heads = self._turned(layer.qkv(normed)[:rows], layer, cos, sin)
            queries = heads[:, : self._config.num_attention_heads].to(self._cache.dtype)
            new = heads[:, self._config.num_attention_heads :].unflatten(1, (2, -1))
            self._places[number][places] = new.to(self._cache.dtype)
            mixed = normed.new_empty(len(normed), queries[0].numel())
            for span, layers in zip(spans, seen, strict=True):
                mixed[span.rows] = self._look(queries[span.rows], *layers[number], span.bias)
            if wanted is not None and number == len(self._layers) - 1:
                x, mixed = x[wanted], mixed[wanted]
            x.add_(layer.out(mixed), alpha=scale)
            x.add_(layer.feed(self._normed(x, layer.feed_norm)), alpha=scale)
        return x

    def _logits(self, x: Tensor) -> Tensor:
        hidden = self._normed(x, self._norm)
        if self._config.logits_scaling != 1:
            hidden *= 1 / self._config.logits_scaling
        return self._head(hidden).float()

    def _company(self, rows: list[int]) -> list[int]:
        """As many rows as products need, whose bits are then those of any number."""
        return rows + rows[:1] * (self._least_rows - len(rows))

    def reads_alike(self, length: int) -> bool:
        """Whether a prompt of `length` tokens gives what a shorter one would that begins it."""
        return not depends_on_length(self._config, length)

    def _angles(self, parts: Sequence[Part]) -> Tensor:
        """RoPE's cosines and sines [2, N, D] of all rows, the sines with the sign of their half."""
        config, half = self._config, self._config.head_dim // 2
        ranges = [range(part.start, part.start + len(part.tokens)) for part in parts]
        if not all(self.reads_alike(part.text_length) for part in parts):
            tables = [
                rope_table(config, torch.tensor(places, device=self.device), part.text_length)
                for part, places in zip(parts, ranges, strict=True)
            ]
            angles = torch.cat(tables, dim=1)
            angles[1, :, :half] *= -1
            return angles
        self._grow_turns(max(places.stop for places in ranges))
        rows = torch.tensor([p for places in ranges for p in places], device=self.device)
        return self._turns[:, rows]

    def _grow_turns(self, longest: int) -> None:
        """For as much of the context as is used: config.json may promise any length.

        For texts of which it does not matter how long they are.
        """
        if self._turns.shape[1] < longest:
            size = min(max(512, 1 << (longest - 1).bit_length()), self.context + 1)
            places = torch.arange(size, device=self.device)
            self._turns = rope_table(self._config, places, length=1)
            self._turns[1, :, : self._config.head_dim // 2] *= -1

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return F.rms_norm(x, weight.shape, weight, self._config.rms_norm_eps).to(self.dtype)
        return rms_norm_cpu(x, self._config.rms_norm_eps)[0].mul_(weight).to(self.dtype)

    def _turned(self, qkv: Tensor, layer: _Layer, cos: Tensor, sin: Tensor) -> Tensor:
        """qkv [N, (H + 2K) * D] -> [N, H + 2K, D] float32, queries and keys by their positions."""
        config = self._config
        width, queries = config.head_dim, config.num_attention_heads
        heads = qkv.view(len(qkv), -1, width).float()
        turned = heads[:, : queries + config.num_key_value_heads]
        if layer.q_norm is not None and layer.k_norm is not None:
            for some, norm in (
                (turned[:, :queries], layer.q_norm),
                (turned[:, queries:], layer.k_norm),
            ):
                some.copy_(F.rms_norm(some, (width,), norm, config.rms_norm_eps))
        # Not in one step: fused ones may round the ends of a row in another way.
        half = turned.roll(width // 2, -1).mul_(sin)
        turned.mul_(cos).add_(half)
        return heads

    def _seen(self, span: _Span) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [slots * K, positions, D] of each layer that a span looks at: views."""
        part = self._cache[:, :, span.slots, :, : span.bias.shape[-1]].flatten(2, 3)
        return list(zip(*part.unbind(1), strict=True))

    def _look(self, q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """Attention of q [rows, H, D] to keys and values [slots * K, positions, D].

        [rows, H * D]: a row of each slot, or tokens of one text, which all look at the same keys.
        """
        heads, width = self._config.num_key_value_heads, q.shape[-1]
        groups, single = q.shape[1] // heads, len(q) * heads == len(keys)
        if not single:
            q = q.view(-1, heads, groups, width).permute(1, 2, 0, 3)
        q = q.reshape(len(keys), -1, width)
        scale = self._config.attention_multiplier or width**-0.5
        weights = torch.baddbmm(bias, q, keys.transpose(1, 2), alpha=scale).softmax(-1)
        out = torch.bmm(weights, values)
        if not single:
            out = out.view(heads, groups, -1, width).permute(2, 0, 1, 3)
        return out.reshape(-1, heads * groups * width)

    def _spans(self, singles: Sequence[Part], chunks: Sequence[Part]) -> list[_Span]:
        heads = self._config.num_key_value_heads
        spans, groups, row = [], self._config.num_attention_heads // heads, 0
        for run in [[part] for part in singles] if self._attends_apart else _neighbours(singles):
            lengths = torch.tensor([part.start + 1 for part in run], device=self.device)
            bias = self._bias(lengths, max(part.start + 1 for part in run))
            bias = bias.repeat_interleave(heads, 0)[:, None].expand(-1, groups, -1)
            slots = slice(run[0].slot, run[-1].slot + 1)
            spans.append(_Span(slice(row, row + len(run)), slots, bias))
            row += len(run)
        for part in chunks:
            end = part.start + len(part.tokens)
            lengths = torch.arange(part.start + 1, end + 1, device=self.device)
            bias = self._bias(lengths, end).repeat(groups, 1).expand(heads, -1, -1)
            slots = slice(part.slot, part.slot + 1)
            spans.append(_Span(slice(row, row + len(part.tokens)), slots, bias))
            row += len(part.tokens)
        return spans

    def _bias(self, lengths: Tensor, longest: int) -> Tensor:
        """[rows, positions]: 0 where a row of a text of so many tokens looks, else -inf."""
        positions = torch.arange(-(-longest // CACHE_STEP) * CACHE_STEP, device=self.device)
        bias = torch.zeros(len(lengths), len(positions), device=self.device)
        bias.masked_fill_(positions >= lengths[:, None], -torch.inf)
        return bias.to(self._cache.dtype)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Give the slot `target` what the slot `source` holds of its first `length` tokens."""
        self._cache[:, :, target, :, :length] = self._cache[:, :, source, :, :length]

    def wipe(self, slot: int, length: int) -> None:
        """Write zeros to the first `length` positions of a slot, and so to no others' memory.

        Numbers that are not finite would damage the next text, even where it does not look.
        """
        self._cache[:, :, slot, :, :length] = 0


def cache_positions(context: int) -> int:
    """Positions of a slot: whole steps, with one at the least beyond the context, for `step`."""
    return (context // CACHE_STEP + 1) * CACHE_STEP


def _neighbours(singles: Sequence[Part]) -> list[list[Part]]:
    """Runs of slots that follow each other."""
    runs: list[list[Part]] = []
    for part in singles:
        if runs and runs[-1][-1].slot + 1 == part.slot:
            runs[-1].append(part)
        else:
            runs.append([part])
    return runs


def _norm_weight(norm: RMSNorm) -> Tensor:
    return norm.weight.detach().float()


def _pack_layer(layer: nn.Module, pack: Packer, slots: int) -> _Layer:
    assert isinstance(layer, Layer)
    attention = layer.self_attn
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    return _Layer(
        input_norm=_norm_weight(layer.input_layernorm),
        qkv=pack(torch.cat([_matrix(projection) for projection in projections])),
        q_norm=None if attention.q_norm is None else _norm_weight(attention.q_norm),
        k_norm=None if attention.k_norm is None else _norm_weight(attention.k_norm),
        out=pack(_matrix(attention.o_proj)),
        feed_norm=_norm_weight(layer.post_attention_layernorm),
        feed=_feed_forward(layer, pack, slots),
    )


def _feed_forward(layer: Layer, pack: Packer, slots: int) -> Linear:
    if layer.mlp is not None:
        both = torch.cat([_matrix(layer.mlp.gate_proj), _matrix(layer.mlp.up_proj)])
        return _swiglu(pack(both), pack(_matrix(layer.mlp.down_proj)))
    assert layer.block_sparse_moe is not None
    moe = _routed(layer.block_sparse_moe, pack, slots)
    if layer.shared_mlp is None:
        return moe
    shared = _swiglu(
        pack(_matrix(layer.shared_mlp.input_linear)), pack(_matrix(layer.shared_mlp.output_linear))
    )
    return lambda x: moe(x) + shared(x)


def _swiglu(gate_up: Linear, down: Linear) -> Linear:
    def forward(x: Tensor) -> Tensor:
        gate, up = gate_up(x).chunk(2, dim=-1)
        return down(F.silu(gate).mul_(up))

    return forward


def _routed(module: RoutedExperts, pack: Packer, slots: int) -> Linear:
    """As `RoutedExperts` computes it; on a CPU with a row's bits independent of the others."""
    if module.router.layer.weight.device.type != "cpu":
        return _routed_on_device(module, slots)
    router = pack.exact(module.router.layer.weight.detach().float())
    matrices = zip(
        module.input_linear.weight.detach(), module.output_linear.weight.detach(), strict=True
    )
    experts = [_swiglu(pack(into), pack(back)) for into, back in matrices]

    def forward(x: Tensor) -> Tensor:
        best, chosen = router(x.float()).topk(module.num_chosen, dim=-1)
        weights = best.softmax(-1).to(x.dtype)
        out = torch.zeros_like(x)
        for number, expert in enumerate(experts):
            rows, places = (chosen == number).nonzero(as_tuple=True)
            if len(rows):
                out[rows] += expert(x[rows]) * weights[rows, places, None]
        return out

    return forward


def _routed_on_device(module: RoutedExperts, few: int) -> Linear:
    """For few rows by all experts: that is no slower, and the device is never waited for."""
    router = module.router.layer.weight.detach().float()
    into, back = module.input_linear.weight.detach(), module.output_linear.weight.detach()

    def forward(x: Tensor) -> Tensor:
        if len(x) > few:
            return module(x[None])[0]
        best, chosen = F.linear(x.float(), router).topk(module.num_chosen, dim=-1)
        return moe_reference(x, chosen, best.softmax(-1).to(x.dtype), into, back)

    return forward


def _matrix(module: nn.Linear) -> Tensor:
    """The weight [out, in], with what an adapter that is being trained adds to it."""
    return (module.merged() if isinstance(module, LoRALinear) else module.weight).detach()
