"""Forward pass of a batch of sequences: packed weights and a shared KV cache.

Shapes in this file:
    N   rows of the batch: one per token that goes through the model
    H   query heads
    K   key/value heads
    G   query heads per key/value head, H / K
    D   head dimension
    R   rows of one attention group
    S   slots of one attention group
    P   cache positions that a group attends to, a multiple of CACHE_STEP

On a CPU where there is a C++ compiler, the forward pass is one call of compiled code
(`native_decoder.py`); else it runs on torch.

On a CPU the forward pass is batch-invariant: the bits of a row do not depend on the other rows.
On torch, matrix products are computed in blocks of row counts that sum in the same order on this
processor (`matmul.py`), and attention is one small product per sequence, over masked positions up
to the longest sequence. Where a trial finds that attention changes its bits with the batch, it runs
sequence by sequence; where no range of row counts holds for a product, `batch_invariant` is False.
tests/inference/test_batched_model.py checks this to the bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.inference.kv_cache import CACHE_STEP, KVCache
from minimind.inference.matmul import Packer, attention_is_batch_invariant
from minimind.inference.native_decoder import NativeDecoder, cache_dtype, is_supported
from minimind.inference.packed_layers import PackedLayer, norm_weight, pack_layer
from minimind.model import Transformer
from minimind.model.norm import rms_norm_cpu
from minimind.model.rope import depends_on_length, rope_table

CHUNK = 64  # prompt tokens that are prefilled together; prefixes are shared in full chunks


@dataclass(frozen=True)
class Part:
    """Consecutive tokens of one sequence.

    start: position of the first token.
    sequence_length: for RoPE scaling that depends on it; 0 = up to the last token here.
    logits_for_last: number of last tokens to return logits for.
    """

    slot: int
    start: int
    tokens: Sequence[int]
    sequence_length: int = 0
    logits_for_last: int = 1

    def __post_init__(self) -> None:
        if not self.sequence_length:
            object.__setattr__(self, "sequence_length", self.start + len(self.tokens))


@dataclass(frozen=True)
class _AttentionGroup:
    """Rows that attend in one product: a prefilled part, or decoded tokens of adjacent slots."""

    rows: slice
    slots: slice
    mask: Tensor  # [S * K, G * R / S, P], additive: 0 = attend, -inf = do not


class BatchedModel:
    """The packed weights of a model, with a KV cache for `slots` sequences of `context` tokens.

    int8: quantize matrices to 8-bit integers with a scale per output row; CPU only.
    threads: CPU threads of the calling thread; None = those of the current one.
    batch_invariant: True when a sequence gets the same bits in any batch.

    Of the model itself only the embedding is kept. Raises ResourceError when the cache does not
    fit into memory.
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
        self._kv_heads = config.num_key_value_heads
        self._groups = config.num_attention_heads // config.num_key_value_heads
        self._embedding = model.model.embed_tokens.weight.detach()
        self._final_norm = norm_weight(model.model.norm)
        threads = threads or torch.get_num_threads()
        self.cache = KVCache(config, slots, context, device=self.device, dtype=cache_dtype(model))
        self._native: NativeDecoder | None = None
        self._rope_table = torch.empty(2, 0, config.head_dim, device=self.device)
        self.batch_invariant = True
        if is_supported(model):
            self._native = NativeDecoder(model, self.cache, int8=int8, threads=threads)
            return
        pack = Packer(self.device, int8=int8, threads=threads)
        self._head = pack(head)
        self._layers = [pack_layer(layer, pack, slots) for layer in model.model.layers]
        self._min_rows = pack.min_rows
        self.batch_invariant = pack.batch_invariant
        self._attend_separately = self.device.type == "cpu" and not attention_is_batch_invariant(
            self._attend,
            self._kv_heads,
            self._groups,
            config.head_dim,
            slots=slots,
            step=CACHE_STEP,
            threads=threads,
        )

    @property
    def is_native(self) -> bool:
        """True when the forward pass runs in compiled code."""
        return self._native is not None

    @property
    def invariance_note(self) -> str:
        """A statement on `batch_invariant` for users."""
        if self.batch_invariant:
            return "an answer does not depend on other requests, to the bit"
        return "other requests may change the last bits of an answer"

    @torch.inference_mode()
    def forward(self, decode: Sequence[Part], prefill: Sequence[Part]) -> Tensor:
        """Return logits [sum of logits_for_last, vocab] float32, decode parts first.

        decode: one token each, ordered by slot. prefill: up to CHUNK tokens each. No two parts may
        share a position of a slot. A prefill part attends to earlier parts of its sequence in the
        same call.
        """
        parts = [*decode, *prefill]
        tokens = [token for part in parts for token in part.tokens]
        positions = [p for part in parts for p in range(part.start, part.start + len(part.tokens))]
        slots = [part.slot for part in parts for _ in part.tokens]
        ends = accumulate(len(part.tokens) for part in parts)
        logit_rows = [
            row
            for part, end in zip(parts, ends, strict=True)
            for row in range(end - part.logits_for_last, end)
        ]
        where = torch.tensor([slots, positions], device=self.device)
        rope = self._rope(parts)
        if self._native is not None:
            x, with_logits = self._embed(torch.tensor(tokens)), torch.tensor(logit_rows).long()
            return self._native.forward(x, where[0], where[1], rope, with_logits)
        groups = self._attention_groups(decode, prefill)
        x = self._embed(torch.tensor(self._pad_rows(tokens), device=self.device))
        kept = None
        if len(logit_rows) < len(tokens):
            kept = torch.tensor(self._pad_rows(logit_rows or [0]), device=self.device)
        x = self._run_layers(x, len(tokens), where, rope, groups, kept)
        return self._logits(x)[: len(logit_rows)]

    @torch.inference_mode()
    def decode(self, tokens: Tensor, positions: Tensor, span: int) -> Tensor:
        """Return logits [N, vocab] float32 after one token [N] in each of the first N slots.

        It never waits for the device, and its shapes depend on N and span alone: it can be captured
        as a CUDA graph. Call `prepare_decode` once before.

        span: positions to attend to, at least those of the longest sequence. A slot without a
        token gets any token at the position `context`, which no sequence uses.
        """
        assert self._rope_table.shape[1] > self.context, "prepare_decode was not called"
        rows = len(tokens)
        where = torch.stack((torch.arange(rows, device=self.device), positions))
        mask = self._decode_mask(positions + 1, span)
        groups = [_AttentionGroup(slice(0, rows), slice(0, rows), mask)]
        x = self._embed(F.pad(tokens, (0, max(0, self._min_rows - rows))))
        x = self._run_layers(x, rows, where, self._rope_table[:, positions], groups)
        return self._logits(x)[:rows]

    def prepare_decode(self) -> None:
        """Build what `decode` needs and cannot build during capture."""
        self._extend_rope_table(self.context + 1)

    def prefix_cacheable(self, length: int) -> bool:
        """Return True when keys do not depend on the length of a sequence of `length` tokens."""
        return not depends_on_length(self._config, length)

    def _embed(self, tokens: Tensor) -> Tensor:
        x = self._embedding[tokens].float()
        if self._config.embedding_multiplier != 1:
            x *= self._config.embedding_multiplier
        return x

    def _logits(self, x: Tensor) -> Tensor:
        hidden = self._rms_norm(x, self._final_norm)
        if self._config.logits_scaling != 1:
            hidden *= 1 / self._config.logits_scaling
        return self._head(hidden).float()

    def _pad_rows(self, rows: list[int]) -> list[int]:
        """Repeat the first row up to the row count from which products are batch-invariant."""
        return rows + rows[:1] * (self._min_rows - len(rows))

    def _run_layers(
        self,
        x: Tensor,
        num_rows: int,
        where: Tensor,
        rope: Tensor,
        groups: Sequence[_AttentionGroup],
        kept: Tensor | None = None,
    ) -> Tensor:
        """Return the hidden states [N, hidden], float32, of all rows or of those in `kept`.

        x: [at least num_rows, hidden], padding last; where: slots and positions [2, num_rows];
        rope: cosines and sines [2, num_rows, D]. The last layer skips rows that are not kept.
        """
        cos, sin = rope.unsqueeze(-2)  # [num_rows, 1, D] each
        slots_and_positions = (where[0], where[1])
        kv_views = [self.cache.kv_views(group.slots, group.mask.shape[-1]) for group in groups]
        num_queries = self._config.num_attention_heads
        scale = self._config.residual_multiplier
        for number, layer in enumerate(self._layers):
            normed = self._rms_norm(x, layer.input_norm)
            heads = self._apply_rope(layer.qkv(normed)[:num_rows], layer, cos, sin)
            queries = heads[:, :num_queries].to(self.cache.dtype)
            keys_values = heads[:, num_queries:].unflatten(1, (2, -1))  # [N, 2K, D] -> [N, 2, K, D]
            self.cache.write(number, slots_and_positions, keys_values)
            mixed = normed.new_empty(len(normed), queries[0].numel())  # [N, H * D]
            for group, views in zip(groups, kv_views, strict=True):
                keys, values = views[number]
                mixed[group.rows] = self._attend(queries[group.rows], keys, values, group.mask)
            if kept is not None and number == len(self._layers) - 1:
                x, mixed = x[kept], mixed[kept]
            x.add_(layer.out(mixed), alpha=scale)
            normed = self._rms_norm(x, layer.feed_forward_norm)
            x.add_(layer.feed_forward(normed), alpha=scale)
        return x

    def _rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return F.rms_norm(x, weight.shape, weight, self._config.rms_norm_eps).to(self.dtype)
        return rms_norm_cpu(x, self._config.rms_norm_eps)[0].mul_(weight).to(self.dtype)

    def _rope(self, parts: Sequence[Part]) -> Tensor:
        """Return cosines and sines [2, N, D] of all rows; see `_negate_first_half` for the sign."""
        ranges = [range(part.start, part.start + len(part.tokens)) for part in parts]
        if not all(self.prefix_cacheable(part.sequence_length) for part in parts):
            tables = [
                rope_table(
                    self._config, torch.tensor(positions, device=self.device), part.sequence_length
                )
                for part, positions in zip(parts, ranges, strict=True)
            ]
            return self._negate_first_half(torch.cat(tables, dim=1))
        self._extend_rope_table(max(positions.stop for positions in ranges))
        rows = torch.tensor([p for positions in ranges for p in positions], device=self.device)
        return self._rope_table[:, rows]

    def _extend_rope_table(self, longest: int) -> None:
        """Extend the table [2, positions, D] of sequences whose length does not matter.

        It grows as needed: config.json may claim a context of any length.
        """
        if self._rope_table.shape[1] < longest:
            size = min(max(512, 1 << (longest - 1).bit_length()), self.context + 1)
            positions = torch.arange(size, device=self.device)
            table = rope_table(self._config, positions, length=1)
            self._rope_table = self._negate_first_half(table)

    def _negate_first_half(self, table: Tensor) -> Tensor:
        """Negate the sines of the first half of the dimensions, in place.

        The rotation is then x * cos + (x with its halves swapped) * sin.
        """
        table[1, :, : self._config.head_dim // 2] *= -1
        return table

    def _apply_rope(self, qkv: Tensor, layer: PackedLayer, cos: Tensor, sin: Tensor) -> Tensor:
        """Split the heads, normalize queries and keys where the model does, and rotate them.

        qkv: [N, (H + 2K) * D] -> [N, H + 2K, D] float32.
        """
        dim, num_queries = self._config.head_dim, self._config.num_attention_heads
        heads = qkv.view(len(qkv), -1, dim).float()
        rotated = heads[:, : num_queries + self._kv_heads]
        if layer.q_norm is not None and layer.k_norm is not None:
            for some, norm in (
                (rotated[:, :num_queries], layer.q_norm),
                (rotated[:, num_queries:], layer.k_norm),
            ):
                some.copy_(F.rms_norm(some, (dim,), norm, self._config.rms_norm_eps))
        # Two steps: a fused multiply-add may round the last elements of a row differently.
        swapped = rotated.roll(dim // 2, -1).mul_(sin)
        rotated.mul_(cos).add_(swapped)
        return heads

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Attention of one group: q [R, H, D], keys and values [S * K, P, D] -> [R, H * D].

        The rows are either one token of each slot (R = S) or tokens of one sequence (S = 1).
        """
        kv_heads, dim = self._kv_heads, q.shape[-1]
        groups = q.shape[1] // kv_heads
        is_decode = len(q) * kv_heads == len(keys)
        if not is_decode:  # [R, H, D] -> [K, G, R, D]
            q = q.view(-1, kv_heads, groups, dim).permute(1, 2, 0, 3)
        q = q.reshape(len(keys), -1, dim)  # decode: [S * K, G, D]; prefill: [K, G * R, D]
        scale = self._config.attention_multiplier or dim**-0.5
        weights = torch.baddbmm(mask, q, keys.transpose(1, 2), alpha=scale).softmax(-1)
        out = torch.bmm(weights, values)  # as q
        if not is_decode:  # [K, G * R, D] -> [R, K, G, D]
            out = out.view(kv_heads, groups, -1, dim).permute(2, 0, 1, 3)
        return out.reshape(-1, kv_heads * groups * dim)

    def _attention_groups(
        self, decode: Sequence[Part], prefill: Sequence[Part]
    ) -> list[_AttentionGroup]:
        groups, row = [], 0
        runs = [[part] for part in decode] if self._attend_separately else _contiguous_runs(decode)
        for run in runs:
            lengths = torch.tensor([part.start + 1 for part in run], device=self.device)
            mask = self._decode_mask(lengths, max(part.start + 1 for part in run))
            slots = slice(run[0].slot, run[-1].slot + 1)
            groups.append(_AttentionGroup(slice(row, row + len(run)), slots, mask))
            row += len(run)
        for part in prefill:
            end = part.start + len(part.tokens)
            lengths = torch.arange(part.start + 1, end + 1, device=self.device)
            mask = self._mask(lengths, end)  # [R, P] -> [K, G * R, P]
            mask = mask.repeat(self._groups, 1).expand(self._kv_heads, -1, -1)
            slots = slice(part.slot, part.slot + 1)
            groups.append(_AttentionGroup(slice(row, row + len(part.tokens)), slots, mask))
            row += len(part.tokens)
        return groups

    def _decode_mask(self, lengths: Tensor, longest: int) -> Tensor:
        """Return the mask [S * K, G, P] of one token in each of S slots; lengths: [S]."""
        mask = self._mask(lengths, longest).repeat_interleave(self._kv_heads, 0)  # [S * K, P]
        return mask[:, None].expand(-1, self._groups, -1)

    def _mask(self, lengths: Tensor, longest: int) -> Tensor:
        """Return an additive mask [R, P]: row r attends to the first lengths[r] positions."""
        positions = torch.arange(-(-longest // CACHE_STEP) * CACHE_STEP, device=self.device)
        mask = torch.zeros(len(lengths), len(positions), device=self.device)
        mask.masked_fill_(positions >= lengths[:, None], -torch.inf)
        return mask.to(self.cache.dtype)


def _contiguous_runs(parts: Sequence[Part]) -> list[list[Part]]:
    """Split parts, ordered by slot, into runs of adjacent slots."""
    runs: list[list[Part]] = []
    for part in parts:
        if runs and runs[-1][-1].slot + 1 == part.slot:
            runs[-1].append(part)
        else:
            runs.append([part])
    return runs
