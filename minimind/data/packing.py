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
_OPEN_WINDOWS = 256  # being filled at once: more pack tighter, fewer keep the order closer
_DOCUMENTS = 1 << 16  # looked at together


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
    """Windows of whole conversations; only what the model is to say is learned.

    What is kept in memory is about 30 bytes a conversation.
    """

    def __init__(self, shards: list[Shard], window: int, *, pad: int, seed: int) -> None:
        self._shards, self._window, self._pad = shards, window, pad
        self._first = np.cumsum([0, *(len(shard.ends) for shard in shards)])  # document of a shard
        self.report = PackingReport()
        lengths = np.concatenate([np.zeros(0, np.int32), *map(self._lengths, shards)])
        usable = np.flatnonzero(lengths)
        order = usable[permute(np.arange(len(usable)), len(usable), seed)]
        windows = _pack(lengths, order, window)
        self._members = order[np.argsort(windows, kind="stable")]
        self._ends = np.cumsum(np.bincount(windows)) if len(windows) else np.zeros(0, np.int64)
        self.report.windows = len(self)
        if len(self):
            self.report.fill = float(lengths.sum(dtype=np.int64)) / (len(self) * window)

    def __len__(self) -> int:
        return len(self._ends)

    def _lengths(self, shard: Shard) -> NDArray[np.int32]:
        """[documents] tokens that each takes in a window, 0 for one with nothing to learn."""
        assert shard.mask is not None, "a chat store has masks"
        parts = [np.zeros(0, np.int32)]
        for at in range(0, len(shard.ends), _DOCUMENTS):
            ends = np.asarray(shard.ends[at : at + _DOCUMENTS])
            base = int(shard.ends[at - 1]) if at else 0
            starts = np.concatenate([[base], ends[:-1]])
            used = np.minimum(ends - starts, self._window + 1)
            answered = np.cumsum(shard.mask[base : ends[-1]], dtype=np.int64)
            # The first token is never a label.
            learned = answered[starts + used - 1 - base] - answered[starts - base]
            # The last token is only a label.
            parts.append(np.where(learned > 0, used - 1, 0).astype(np.int32))
            self.report.conversations += len(ends)
            self.report.cut += int((ends - starts > self._window + 1).sum())
            self.report.unsupervised += int((learned == 0).sum())
        return np.concatenate(parts)

    def window(
        self, index: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32] | None]:
        tokens = np.full(self._window, self._pad, np.int64)
        labels = np.full(self._window, IGNORED, np.int64)
        members = self._members[self._ends[index - 1] if index else 0 : self._ends[index]]
        segments = np.full(self._window, len(members), np.int32)  # padding is a segment of its own
        at = 0
        for segment, member in enumerate(members):
            number = int(np.searchsorted(self._first, member, side="right")) - 1
            shard, document = self._shards[number], int(member - self._first[number])
            assert shard.mask is not None, "a chat store has masks"
            start = int(shard.ends[document - 1]) if document else 0
            end = min(int(shard.ends[document]), start + self._window + 1)
            ids, mask = shard.tokens[start:end], shard.mask[start:end]
            here = slice(at, at + len(ids) - 1)
            tokens[here] = ids[:-1]
            labels[here] = np.where(mask[1:] == 1, ids[1:].astype(np.int64), IGNORED)
            segments[here] = segment
            at = here.stop
        return tokens, labels, segments


def _pack(lengths: NDArray[np.int32], order: NDArray[np.int64], window: int) -> NDArray[np.int32]:
    """The window of each document of `order`: best fit, where it leaves the least room."""
    windows = np.zeros(len(order), np.int32)
    rooms: list[tuple[int, int]] = []  # (tokens free, window), sorted
    count = 0
    for place, length in enumerate(lengths[order].tolist()):
        fit = bisect_left(rooms, (length, -1))
        if fit < len(rooms):
            free, chosen = rooms.pop(fit)
        else:
            free, chosen, count = window, count, count + 1
            if len(rooms) >= _OPEN_WINDOWS:
                rooms.pop(0)
        windows[place] = chosen
        if free > length:
            insort(rooms, (free - length, chosen))
    return windows


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
