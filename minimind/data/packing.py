"""Documents cut and packed into training windows of a fixed number of tokens.

Text: windows are laid end to end over the token stream; nothing is padded, nothing is lost but
the tail of a shard. Conversations: whole ones are packed together into windows, and each has
a segment number of its own, where attention and positions stop. Preference pairs: the same, with
both sides of a pair in one window.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from minimind.data.order import Order, permute
from minimind.data.store import Shard

IGNORED = -100  # label of a token that is not learned; torch's cross_entropy skips it
_OPEN_WINDOWS = 256  # being filled at once: more pack tighter, fewer keep the order closer
_DOCUMENTS = 1 << 16  # looked at together


@dataclass(frozen=True)
class Pairs:
    """The P preference pairs in a batch of B windows of T tokens.

    sequences: [B, T] int64, 2p on the chosen side of pair p and 2p + 1 on the rejected one (what
    stands on padding means nothing); reference: [P, 2] float32, log-probabilities of both
    answers by the model that training began with.
    """

    sequences: NDArray[np.int64]
    reference: NDArray[np.float32]


@dataclass(frozen=True)
class Batch:
    """Some windows. B windows of T tokens.

    tokens: [B, T] int64; labels: [B, T] int64, the next token or IGNORED;
    segments: [B, T] int32 or None, one number a conversation; samples: their places in the run;
    pairs: where the windows hold preference pairs.
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    segments: NDArray[np.int32] | None
    samples: range
    pairs: Pairs | None = None


class Sequences(Protocol):
    """Windows of one part of the data."""

    def __len__(self) -> int: ...

    def sequence(
        self, index: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32] | None]:
        """(tokens, labels, segments) of one window, each [T]."""
        ...


class TextSequences:
    """Windows over running text; the label of each token is the next one."""

    def __init__(self, shards: list[Shard], seq_len: int) -> None:
        self._shards = [shard.tokens for shard in shards]
        self._seq_len = seq_len
        counts = [max(0, (len(tokens) - 1) // seq_len) for tokens in self._shards]
        self._ends = np.cumsum(counts, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def sequence(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64], None]:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[shard - 1]) if shard else 0
        start = (index - first) * self._seq_len
        cut = np.asarray(self._shards[shard][start : start + self._seq_len + 1], np.int64)
        return cut[:-1], cut[1:], None


@dataclass
class PackingReport:
    """What packing did with the conversations, or with the preference pairs."""

    conversations: int = 0  # or pairs
    cut: int = 0  # longer than the window: the end is lost
    unsupervised: int = 0  # nothing left to learn: left out
    identical: int = 0  # pairs whose sides are the same, perhaps since they were cut: left out
    sequences: int = 0
    fill: float = 0.0  # share of the windows' tokens that is text


class _PackedWindows:
    """Windows in which whole conversations stand side by side, each a segment of its own."""

    def __init__(self, shards: list[Shard], seq_len: int, pad: int) -> None:
        self._shards, self._seq_len, self._pad = shards, seq_len, pad
        self._first = np.cumsum([0, *(len(shard.ends) for shard in shards)])  # document of a shard
        self.report = PackingReport()

    def _arrange(self, lengths: NDArray[np.int32], seed: int) -> None:
        """Choose a window for each thing of `lengths` tokens; those of length 0 are left out."""
        usable = np.flatnonzero(lengths)
        order = usable[permute(np.arange(len(usable)), len(usable), seed)]
        sequences = _pack(lengths, order, self._seq_len)
        self._members = order[np.argsort(sequences, kind="stable")]
        self._ends = np.cumsum(np.bincount(sequences)) if len(sequences) else np.zeros(0, np.int64)
        self.report.sequences = len(self)
        if len(self):
            self.report.fill = float(lengths.sum(dtype=np.int64)) / (len(self) * self._seq_len)

    def __len__(self) -> int:
        return len(self._ends)

    def members(self, index: int) -> slice:
        """Which of the members stand in a window."""
        return slice(int(self._ends[index - 1]) if index else 0, int(self._ends[index]))

    def _documents(self, index: int) -> list[tuple[int, int]]:
        """(document, how many of its tokens at most) of each segment of a window."""
        raise NotImplementedError

    def sequence(
        self, index: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32] | None]:
        tokens = np.full(self._seq_len, self._pad, np.int64)
        labels = np.full(self._seq_len, IGNORED, np.int64)
        documents = self._documents(index)
        segments = np.full(self._seq_len, len(documents), np.int32)  # padding has one of its own
        at = 0
        for segment, (document, most) in enumerate(documents):
            number = int(np.searchsorted(self._first, document, side="right")) - 1
            shard, place = self._shards[number], document - int(self._first[number])
            assert shard.mask is not None, "conversations have masks"
            start = int(shard.ends[place - 1]) if place else 0
            end = min(int(shard.ends[place]), start + most)
            ids, mask = shard.tokens[start:end], shard.mask[start:end]
            here = slice(at, at + len(ids) - 1)
            tokens[here] = ids[:-1]
            labels[here] = np.where(mask[1:] == 1, ids[1:].astype(np.int64), IGNORED)
            segments[here] = segment
            at = here.stop
        return tokens, labels, segments


class ChatSequences(_PackedWindows):
    """Windows of whole conversations; only what the model is to say is learned.

    What is kept in memory is about 30 bytes a conversation.
    """

    def __init__(self, shards: list[Shard], seq_len: int, *, pad: int, seed: int) -> None:
        super().__init__(shards, seq_len, pad)
        self._arrange(np.concatenate([np.zeros(0, np.int32), *map(self._lengths, shards)]), seed)

    def _lengths(self, shard: Shard) -> NDArray[np.int32]:
        """[documents] tokens that each takes in a window, 0 for one with nothing to learn."""
        parts = [np.zeros(0, np.int32)]
        for starts, sizes, answered in _looked_at(shard):
            used = np.minimum(sizes, self._seq_len + 1)
            # The first token is never a label.
            learned = answered[starts + used - 1] - answered[starts]
            # The last token is only a label.
            parts.append(np.where(learned > 0, used - 1, 0).astype(np.int32))
            self.report.conversations += len(sizes)
            self.report.cut += int((sizes > self._seq_len + 1).sum())
            self.report.unsupervised += int((learned == 0).sum())
        return np.concatenate(parts)

    def _documents(self, index: int) -> list[tuple[int, int]]:
        return [(int(member), self._seq_len + 1) for member in self._members[self.members(index)]]


class PairSequences(_PackedWindows):
    """Windows of whole preference pairs, the chosen side of each and then the rejected one.

    A side of an even segment number is a chosen one, the next the rejected one of its pair. Pairs
    that are longer than a window lose the end of the longer side, but none loses what would fit
    into half a window. `reference`: [pairs, 2] float32, in the order of the windows, is for
    whoever trains to fill in; NaN until then. About 40 bytes a pair are kept in memory.
    """

    def __init__(self, shards: list[Shard], seq_len: int, *, pad: int, seed: int) -> None:
        super().__init__(shards, seq_len, pad)
        used = [np.zeros((0, 2), np.int32), *map(self._used, shards)]
        self._tokens = np.concatenate(used)  # [pairs, 2], 0 for a pair that is left out
        self._arrange(self._tokens.sum(1, dtype=np.int32), seed)
        self.reference = np.full((len(self._members), 2), np.nan, np.float32)

    def _used(self, shard: Shard) -> NDArray[np.int32]:
        """[pairs, 2] tokens that each side takes in a window."""
        parts = [np.zeros((0, 2), np.int32)]
        base = 0
        for starts, sizes, answered in _looked_at(shard):
            wanted = sizes.reshape(-1, 2) - 1  # the last token is only a label
            room = np.maximum(self._seq_len // 2, self._seq_len - wanted[:, ::-1])
            used = np.minimum(wanted, room)
            sides = starts.reshape(-1, 2)
            learned = answered[sides + used] - answered[sides]  # the first is never a label
            empty = (learned == 0).any(1)
            same = used[:, 0] == used[:, 1]
            for pair in np.flatnonzero(same):
                chosen, rejected = (
                    shard.tokens[base + start : base + start + used[pair, 0] + 1]
                    for start in sides[pair]
                )
                same[pair] = np.array_equal(chosen, rejected)
            cut = (used < wanted).any(1)
            same &= ~(cut & empty)  # of those it was the prompt that is left
            parts.append(np.where((same | empty)[:, None], 0, used).astype(np.int32))
            base += int(sizes.sum())
            self.report.conversations += len(wanted)
            self.report.cut += int(cut.sum())
            self.report.identical += int(same.sum())
            self.report.unsupervised += int((empty & ~same).sum())
        return np.concatenate(parts)

    def _documents(self, index: int) -> list[tuple[int, int]]:
        members = self._members[self.members(index)]
        return [
            (2 * int(pair) + side, int(self._tokens[pair, side]) + 1)
            for pair in members
            for side in (0, 1)
        ]


def _looked_at(
    shard: Shard,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """(starts, sizes, answered) of many documents at once.

    answered[i] is how many of the first i + 1 tokens are to be produced; starts count from there.
    """
    assert shard.mask is not None, "conversations have masks"
    for at in range(0, len(shard.ends), _DOCUMENTS):
        ends = np.asarray(shard.ends[at : at + _DOCUMENTS])
        base = int(shard.ends[at - 1]) if at else 0
        starts = np.concatenate([[base], ends[:-1]])
        answered = np.cumsum(shard.mask[base : ends[-1]], dtype=np.int64)
        yield starts - base, ends - starts, answered


def _pack(lengths: NDArray[np.int32], order: NDArray[np.int64], seq_len: int) -> NDArray[np.int32]:
    """The window of each document of `order`: best fit, where it leaves the least room."""
    sequences = np.zeros(len(order), np.int32)
    rooms: list[tuple[int, int]] = []  # (tokens free, window), sorted
    count = 0
    for place, length in enumerate(lengths[order].tolist()):
        fit = bisect_left(rooms, (length, -1))
        if fit < len(rooms):
            free, chosen = rooms.pop(fit)
        else:
            free, chosen, count = seq_len, count, count + 1
            if len(rooms) >= _OPEN_WINDOWS:
                rooms.pop(0)
        sequences[place] = chosen
        if free > length:
            insort(rooms, (free - length, chosen))
    return sequences


class MixedDataset:
    """A weighted mix of windows in the order of the run; the data side of a training run."""

    def __init__(self, parts: list[Sequences], weights: list[float], seed: int) -> None:
        self.parts = parts
        self.order = Order(tuple(len(part) for part in parts), tuple(weights), seed)

    def batch(self, start: int, count: int) -> Batch:
        """Samples start … start+count-1 of the run."""
        return self.stack(self.order.locate(start, count), range(start, start + count))

    def stack(self, places: list[tuple[int, int]], samples: range = range(0)) -> Batch:
        """The windows in `places`, each a part and a number in it, on top of each other."""
        rows = [self.parts[part].sequence(index) for part, index in places]
        tokens, labels, segments = (list(column) for column in zip(*rows, strict=True))
        batch = Batch(
            np.stack(tokens),
            np.stack(labels),
            None if segments[0] is None else np.stack(segments),
            samples,
        )
        references = self.references(places)
        return replace(batch, pairs=_pairs(batch, references)) if references else batch

    def references(self, places: list[tuple[int, int]]) -> list[NDArray[np.float32]]:
        """[pairs, 2] of each of the windows, to read or to fill in; of other windows nothing."""
        parts = [(self.parts[part], index) for part, index in places]
        return [
            part.reference[part.members(index)]
            for part, index in parts
            if isinstance(part, PairSequences)
        ]


def _pairs(batch: Batch, references: list[NDArray[np.float32]]) -> Pairs:
    """Number the pairs of several windows through."""
    assert batch.segments is not None and len(references) == len(batch.segments)
    before = np.cumsum([0, *(len(reference) for reference in references[:-1])])
    return Pairs(batch.segments + 2 * before[:, None], np.concatenate(references))
