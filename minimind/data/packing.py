"""Packing: documents to training sequences of a fixed number of tokens.

Text: the token stream of a shard is sliced into sequences. There is no padding, and only the tail
of each shard is dropped. Conversations: several are packed into one sequence, each as a segment.
Attention and position ids stop at segment borders. Preference pairs: the same, with both sides of
a pair in one sequence. Packing is best-fit bin packing (see `_best_fit`).

Shape legend, here and in training:

    B  sequences in a batch         D  documents of a chunk of a shard
    T  tokens of a sequence         P  preference pairs
    I  items to pack: conversations or preference pairs
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from minimind.data.order import Order, permute
from minimind.data.store import Shard

IGNORED = -100  # label of a token outside the loss; default ignore_index of torch's cross_entropy
_OPEN_SEQUENCES = (
    256  # open bins of `_best_fit`: more give less padding, fewer keep closer to the order
)
_CHUNK_DOCUMENTS = 1 << 16


@dataclass(frozen=True)
class Pairs:
    """The preference pairs of a batch.

    side_ids: [B, T] int64, 2p on the chosen side of pair p and 2p + 1 on its rejected side; its
    values on padding have no meaning. reference: [P, 2] float32, log-probabilities of the chosen
    and the rejected answer under the reference model.
    """

    side_ids: NDArray[np.int64]
    reference: NDArray[np.float32]


@dataclass(frozen=True)
class Batch:
    """A batch of sequences.

    tokens: [B, T] int64. labels: [B, T] int64, the next token, or IGNORED outside the loss.
    segments: [B, T] int32, a number for each conversation of a sequence; None for text.
    samples: positions of the sequences in the run. pairs: None unless the data are preference
    pairs.
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    segments: NDArray[np.int32] | None
    samples: range
    pairs: Pairs | None = None


class Sequences(Protocol):
    """The training sequences of one source of data."""

    def __len__(self) -> int: ...

    def sequence(
        self, index: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32] | None]:
        """Return (tokens, labels, segments) of one sequence, each [T]."""
        ...


class TextSequences:
    """Sequences of running text; every token is supervised."""

    def __init__(self, shards: list[Shard], seq_len: int) -> None:
        self._shards = [shard.tokens for shard in shards]
        self._seq_len = seq_len
        counts = [max(0, (len(tokens) - 1) // seq_len) for tokens in self._shards]
        self._ends = np.cumsum(counts, dtype=np.int64)  # [shards]

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def sequence(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64], None]:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[shard - 1]) if shard else 0
        start = (index - first) * self._seq_len
        # --8<-- [start:cut]
        ids = np.asarray(self._shards[shard][start : start + self._seq_len + 1], np.int64)  # [T+1]
        return ids[:-1], ids[1:], None
        # --8<-- [end:cut]


@dataclass
class PackingReport:
    """Statistics of packing. An item is a conversation or a preference pair."""

    items: int = 0
    truncated: int = 0  # longer than a sequence: the end is lost
    unsupervised: int = 0  # left out: no supervised tokens, perhaps because of truncation
    identical: int = 0  # pairs left out: both sides are the same, perhaps because of truncation
    sequences: int = 0
    packing_efficiency: float = 0.0  # tokens that are not padding / all tokens


class _PackedSequences:
    """Sequences of packed items; each conversation in them is a segment."""

    def __init__(self, shards: list[Shard], seq_len: int, pad_id: int) -> None:
        self._shards, self._seq_len, self._pad_id = shards, seq_len, pad_id
        # [shards + 1] number of the first document of each shard
        self._first_document = np.cumsum([0, *(len(shard.ends) for shard in shards)])
        self.report = PackingReport()

    def _pack(self, lengths: NDArray[np.int32], seed: int) -> None:
        """Assign items of `lengths` [I] tokens to sequences; items of length 0 are left out."""
        usable = np.flatnonzero(lengths)
        order = usable[permute(np.arange(len(usable)), len(usable), seed)]
        sequences = _best_fit(lengths, order, self._seq_len)
        # [packed items] item numbers, grouped by sequence
        self._items = order[np.argsort(sequences, kind="stable")]
        # [sequences] where each group ends in `_items`
        self._ends = np.cumsum(np.bincount(sequences)) if len(sequences) else np.zeros(0, np.int64)
        self.report.sequences = len(self)
        if len(self):
            num_tokens = float(lengths.sum(dtype=np.int64))
            self.report.packing_efficiency = num_tokens / (len(self) * self._seq_len)

    def __len__(self) -> int:
        return len(self._ends)

    def item_slice(self, index: int) -> slice:
        """Return the slice of the packed items that a sequence consists of."""
        return slice(int(self._ends[index - 1]) if index else 0, int(self._ends[index]))

    def _documents(self, index: int) -> list[tuple[int, int]]:
        """Return (document, number of tokens to truncate it to) for each segment of a sequence."""
        raise NotImplementedError

    def sequence(
        self, index: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32] | None]:
        tokens = np.full(self._seq_len, self._pad_id, np.int64)  # [T]
        labels = np.full(self._seq_len, IGNORED, np.int64)  # [T]
        documents = self._documents(index)
        segments = np.full(self._seq_len, len(documents), np.int32)  # [T], padding comes last
        offset = 0
        for segment, (document, limit) in enumerate(documents):
            number = int(np.searchsorted(self._first_document, document, side="right")) - 1
            shard, local = self._shards[number], document - int(self._first_document[number])
            assert shard.mask is not None, "conversations have loss masks"
            start = int(shard.ends[local - 1]) if local else 0
            end = min(int(shard.ends[local]), start + limit)
            ids, mask = shard.tokens[start:end], shard.mask[start:end]
            # --8<-- [start:packed-labels]
            # n tokens give n - 1 positions: inputs ids[:-1], labels ids[1:].
            positions = slice(offset, offset + len(ids) - 1)
            tokens[positions] = ids[:-1]
            labels[positions] = np.where(mask[1:] == 1, ids[1:].astype(np.int64), IGNORED)
            segments[positions] = segment
            # --8<-- [end:packed-labels]
            offset = positions.stop
        return tokens, labels, segments


class ChatSequences(_PackedSequences):
    """Sequences of packed conversations; only the tokens of answers are supervised.

    About 30 bytes per conversation are kept in memory.
    """

    def __init__(self, shards: list[Shard], seq_len: int, *, pad_id: int, seed: int) -> None:
        super().__init__(shards, seq_len, pad_id)
        self._pack(np.concatenate([np.zeros(0, np.int32), *map(self._lengths, shards)]), seed)

    def _lengths(self, shard: Shard) -> NDArray[np.int32]:
        """Return the length of each document in positions; 0 without supervised tokens."""
        lengths = [np.zeros(0, np.int32)]
        for starts, sizes, supervised_cumsum in _chunks(shard):
            used = np.minimum(sizes, self._seq_len + 1)  # [D] tokens, truncated
            # [D] supervised tokens; the first token of a document is never a label
            supervised = supervised_cumsum[starts + used - 1] - supervised_cumsum[starts]
            lengths.append(np.where(supervised > 0, used - 1, 0).astype(np.int32))
            self.report.items += len(sizes)
            self.report.truncated += int((sizes > self._seq_len + 1).sum())
            self.report.unsupervised += int((supervised == 0).sum())
        return np.concatenate(lengths)

    def _documents(self, index: int) -> list[tuple[int, int]]:
        return [(int(item), self._seq_len + 1) for item in self._items[self.item_slice(index)]]


class PairSequences(_PackedSequences):
    """Sequences of packed preference pairs, each as its chosen and then its rejected side.

    Segment 2p of a sequence is the chosen side of its pair p, segment 2p + 1 the rejected side. A
    pair that is longer than a sequence loses the end of its longer side; a side that fits into half
    a sequence is never truncated. `reference`: [packed pairs, 2] float32 in the order of the
    sequences, NaN until training fills in the log-probabilities of the reference model. About 40
    bytes per pair are kept in memory.
    """

    def __init__(self, shards: list[Shard], seq_len: int, *, pad_id: int, seed: int) -> None:
        super().__init__(shards, seq_len, pad_id)
        lengths = [np.zeros((0, 2), np.int32), *map(self._side_lengths, shards)]
        self._lengths = np.concatenate(lengths)  # [pairs, 2] positions, 0 for a pair left out
        self._pack(self._lengths.sum(1, dtype=np.int32), seed)
        self.reference = np.full((len(self._items), 2), np.nan, np.float32)

    def _side_lengths(self, shard: Shard) -> NDArray[np.int32]:
        """Return the lengths of both sides in positions, [pairs, 2]; 0 for a pair left out."""
        lengths = [np.zeros((0, 2), np.int32)]
        base = 0
        for starts, sizes, supervised_cumsum in _chunks(shard):
            full = sizes.reshape(-1, 2) - 1  # [P, 2] positions; the last token is only a label
            room = np.maximum(self._seq_len // 2, self._seq_len - full[:, ::-1])  # [P, 2]
            used = np.minimum(full, room)  # [P, 2]
            side_starts = starts.reshape(-1, 2)  # [P, 2]
            # [P, 2] supervised tokens; the first token of a side is never a label
            supervised = supervised_cumsum[side_starts + used] - supervised_cumsum[side_starts]
            unsupervised = (supervised == 0).any(1)  # [P]
            identical = used[:, 0] == used[:, 1]  # [P] candidates: the same length
            for pair in np.flatnonzero(identical):
                chosen, rejected = (
                    shard.tokens[base + start : base + start + used[pair, 0] + 1]
                    for start in side_starts[pair]
                )
                identical[pair] = np.array_equal(chosen, rejected)
            truncated = (used < full).any(1)  # [P]
            # Truncated to their common prompt: counted as unsupervised, not as identical.
            identical &= ~(truncated & unsupervised)
            left_out = (identical | unsupervised)[:, None]
            lengths.append(np.where(left_out, 0, used).astype(np.int32))
            base += int(sizes.sum())
            self.report.items += len(full)
            self.report.truncated += int(truncated.sum())
            self.report.identical += int(identical.sum())
            self.report.unsupervised += int((unsupervised & ~identical).sum())
        return np.concatenate(lengths)

    def _documents(self, index: int) -> list[tuple[int, int]]:
        return [
            (2 * int(pair) + side, int(self._lengths[pair, side]) + 1)
            for pair in self._items[self.item_slice(index)]
            for side in (0, 1)
        ]


def _chunks(
    shard: Shard,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """Yield (starts, sizes, supervised_cumsum) for chunks of the documents of a shard.

    starts: [D] first token of each document, counted from the first token of the chunk. sizes: [D]
    tokens of each document. supervised_cumsum: [tokens of the chunk] supervised tokens up to and
    including each token.
    """
    assert shard.mask is not None, "conversations have loss masks"
    for first in range(0, len(shard.ends), _CHUNK_DOCUMENTS):
        ends = np.asarray(shard.ends[first : first + _CHUNK_DOCUMENTS])
        base = int(shard.ends[first - 1]) if first else 0
        starts = np.concatenate([[base], ends[:-1]])
        supervised_cumsum = np.cumsum(shard.mask[base : ends[-1]], dtype=np.int64)
        yield starts - base, ends - starts, supervised_cumsum


def _best_fit(
    lengths: NDArray[np.int32], order: NDArray[np.int64], seq_len: int
) -> NDArray[np.int32]:
    """Return the sequence of each item of `order`, by online best fit (Johnson 1973).

    Each item goes into the open sequence (bin) with the least sufficient free space, or into a new
    one. If more than `_OPEN_SEQUENCES` are open, the fullest is closed.
    """
    # --8<-- [start:best-fit]
    sequences = np.zeros(len(order), np.int32)
    free_space: list[tuple[int, int]] = []  # (free tokens, sequence), sorted
    count = 0
    for position, length in enumerate(lengths[order].tolist()):
        fit = bisect_left(free_space, (length, -1))
        if fit < len(free_space):
            free, chosen = free_space.pop(fit)
        else:
            free, chosen, count = seq_len, count, count + 1
            if len(free_space) >= _OPEN_SEQUENCES:
                free_space.pop(0)
        sequences[position] = chosen
        if free > length:
            insort(free_space, (free - length, chosen))
    return sequences
    # --8<-- [end:best-fit]


class MixedDataset:
    """Weighted mixture of sources, in the data order of a run."""

    def __init__(self, sources: list[Sequences], weights: list[float], seed: int) -> None:
        self.sources = sources
        self.order = Order(tuple(len(source) for source in sources), tuple(weights), seed)

    def batch(self, start: int, count: int) -> Batch:
        """Return samples start..start+count-1 of the run."""
        return self.stack(self.order.locate(start, count), range(start, start + count))

    def stack(self, locations: list[tuple[int, int]], samples: range = range(0)) -> Batch:
        """Return the batch of the sequences at `locations`: (source, index of the sequence)."""
        rows = [self.sources[source].sequence(index) for source, index in locations]
        tokens, labels, segments = (list(column) for column in zip(*rows, strict=True))
        batch = Batch(
            np.stack(tokens),  # [B, T]
            np.stack(labels),  # [B, T]
            None if segments[0] is None else np.stack(segments),  # [B, T]
            samples,
        )
        references = self.references(locations)
        return replace(batch, pairs=_pairs(batch, references)) if references else batch

    def references(self, locations: list[tuple[int, int]]) -> list[NDArray[np.float32]]:
        """Return views [pairs of a sequence, 2] of the reference log-probabilities.

        One view per sequence of preference pairs; none for other sequences.
        """
        located = [(self.sources[source], index) for source, index in locations]
        return [
            source.reference[source.item_slice(index)]
            for source, index in located
            if isinstance(source, PairSequences)
        ]


def _pairs(batch: Batch, references: list[NDArray[np.float32]]) -> Pairs:
    """Offset the pair ids of each sequence so that they are unique in the batch."""
    assert batch.segments is not None and len(references) == len(batch.segments)
    offsets = np.cumsum([0, *(len(reference) for reference in references[:-1])])  # [B]
    return Pairs(
        batch.segments + 2 * offsets[:, None],  # [B, T]
        np.concatenate(references),  # [P, 2]
    )
