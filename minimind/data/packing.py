"""Documents cut and packed into training windows of a fixed number of tokens.

Text: windows are laid end to end over the token stream; nothing is padded, nothing is lost but
the tail of a shard. Conversations: whole ones are packed together into windows, and each has
a segment number of its own, where attention and positions stop.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from minimind.data.order import Order, permute
from minimind.data.store import Shard

IGNORED = -100  # label of a token that is not learned; torch's cross_entropy skips it
_OPEN_BINS = 256  # windows being filled at once: more pack tighter, fewer keep an order closer


@dataclass(frozen=True)
class Batch:
    """Some windows. B windows of T tokens.

    tokens: [B, T] int64; labels: [B, T] int64, the next token or IGNORED;
    segments: [B, T] int32 or None, one number a conversation; samples: their places in the run.
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    segments: NDArray[np.int32] | None
    samples: range


class Windows(Protocol):
    """Windows of one part of the data."""

    def __len__(self) -> int: ...

    def window(
        self, index: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32] | None]:
        """(tokens, labels, segments) of one window, each [T]."""
        ...


class TextWindows:
    """Windows over running text; the label of each token is the next one."""

    def __init__(self, shards: list[Shard], window: int) -> None:
        self._shards = [shard.tokens for shard in shards]
        self._window = window
        counts = [max(0, (len(tokens) - 1) // window) for tokens in self._shards]
        self._ends = np.cumsum(counts, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def window(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64], None]:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[shard - 1]) if shard else 0
        start = (index - first) * self._window
        cut = np.asarray(self._shards[shard][start : start + self._window + 1], np.int64)
        return cut[:-1], cut[1:], None


@dataclass
class PackingReport:
    """What packing did with the conversations."""

    conversations: int = 0
    cut: int = 0  # longer than the window: the end is lost
    unsupervised: int = 0  # nothing left to learn: left out
    windows: int = 0
    fill: float = 0.0  # share of the windows' tokens that is text


class ChatWindows:
    """Windows of whole conversations; only what the model is to say is learned."""

    def __init__(self, shards: list[Shard], window: int, *, pad: int, seed: int) -> None:
        self._shards, self._window, self._pad = shards, window, pad
        self._starts = [np.concatenate([[0], shard.ends[:-1]]) for shard in shards]
        self.report = PackingReport()
        self._bins = _pack(self._lengths(), window, seed, self.report)

    def __len__(self) -> int:
        return len(self._bins)

    def _lengths(self) -> dict[tuple[int, int], int]:
        """Tokens that each usable conversation takes in a window, by (shard, document)."""
        lengths: dict[tuple[int, int], int] = {}
        for number, (shard, starts) in enumerate(zip(self._shards, self._starts, strict=True)):
            assert shard.mask is not None, "a chat store has masks"
            for document, (start, end) in enumerate(zip(starts, shard.ends, strict=True)):
                self.report.conversations += 1
                self.report.cut += int(end - start > self._window + 1)
                used = min(int(end - start), self._window + 1)
                if shard.mask[start + 1 : start + used].any():
                    lengths[number, document] = used - 1  # the last token is only a label
                else:
                    self.report.unsupervised += 1
        return lengths

    def window(
        self, index: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32] | None]:
        tokens = np.full(self._window, self._pad, np.int64)
        labels = np.full(self._window, IGNORED, np.int64)
        members = self._bins[index]
        segments = np.full(self._window, len(members), np.int32)  # padding is a segment of its own
        at = 0
        for segment, (number, document) in enumerate(members):
            shard, start = self._shards[number], int(self._starts[number][document])
            assert shard.mask is not None, "a chat store has masks"
            end = min(int(shard.ends[document]), start + self._window + 1)
            ids, mask = shard.tokens[start:end], shard.mask[start:end]
            here = slice(at, at + len(ids) - 1)
            tokens[here] = ids[:-1]
            labels[here] = np.where(mask[1:] == 1, ids[1:].astype(np.int64), IGNORED)
            segments[here] = segment
            at = here.stop
        return tokens, labels, segments


def _pack(
    lengths: dict[tuple[int, int], int], window: int, seed: int, report: PackingReport
) -> list[list[tuple[int, int]]]:
    """Best fit in a shuffled order: each conversation goes where it leaves the least room."""
    keys = list(lengths)
    order = permute(np.arange(len(keys)), len(keys), seed) if keys else np.zeros(0, np.int64)
    bins: list[list[tuple[int, int]]] = []
    rooms: list[tuple[int, int]] = []  # (tokens free, bin), sorted
    for key in (keys[place] for place in order.tolist()):
        length = lengths[key]
        place = bisect_left(rooms, (length, -1))
        if place < len(rooms):
            free, chosen = rooms.pop(place)
        else:
            free, chosen = window, len(bins)
            bins.append([])
            if len(rooms) >= _OPEN_BINS:
                rooms.pop(0)
        bins[chosen].append(key)
        if free > length:
            insort(rooms, (free - length, chosen))
    report.windows = len(bins)
    report.fill = sum(lengths.values()) / (len(bins) * window) if bins else 0.0
    return bins


class Mix:
    """A weighted mix of windows in the order of the run; the data side of a training run."""

    def __init__(self, parts: list[Windows], weights: list[float], seed: int) -> None:
        self.parts = parts
        self.order = Order(tuple(len(part) for part in parts), tuple(weights), seed)

    def batch(self, start: int, count: int) -> Batch:
        """Samples start … start+count-1 of the run."""
        return stack(
            [self.parts[part].window(index) for part, index in self.order.locate(start, count)],
            range(start, start + count),
        )


def stack(rows: list[tuple[Any, Any, Any]], samples: range) -> Batch:
    """Put windows on top of each other."""
    tokens, labels, segments = zip(*rows, strict=True)
    return Batch(
        np.stack(tokens),
        np.stack(labels),
        None if segments[0] is None else np.stack(segments),
        samples,
    )
