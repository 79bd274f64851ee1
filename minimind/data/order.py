"""The order of samples: a pure function of (seed, position in the run), so that any run resumes.

Nothing is shuffled in memory. A keyed Feistel network permutes 0..n-1 one index at a time
(Luby and Rackoff 1988), and indices that fall outside the range walk on until they are inside
(Black and Rogaway 2002, "cycle walking").
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8  # a small domain needs more than the textbook four


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64 bits (the finaliser of SplitMix64, Steele et al. 2014)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def permute(indices: NDArray[np.int64], size: int, *key: int) -> NDArray[np.int64]:
    """Send each of `indices` (each in 0..size-1) to its place in the permutation named by `key`."""
    half = np.uint64(max(4, (max(size - 1, 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    with np.errstate(over="ignore"):
        seed = np.zeros(1, np.uint64)
        for part in key:
            seed = _mix(seed + np.uint64(part) + np.uint64(0x9E3779B97F4A7C15))
        values = np.asarray(indices).astype(np.uint64)
        outside = np.ones(values.shape, bool)
        while outside.any():
            left, right = values[outside] >> half, values[outside] & low
            for number in range(_ROUNDS):
                left, right = right, left ^ (_mix(right + seed + np.uint64(number)) & low)
            values[outside] = (left << half) | right
            outside = values >= np.uint64(size)
    return values.astype(np.int64)


@dataclass(frozen=True)
class Order:
    """Which window each sample of a run is, for a mix of parts.

    `sizes[p]` is the number of windows of part p, and `weights[p]` says how many times an epoch
    sees each of them. A part whose share is not whole goes on in the next epoch where it stopped,
    so that over many epochs each window of a part is seen equally often.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int

    @property
    def shares(self) -> tuple[int, ...]:
        """Samples an epoch takes from each part."""
        return tuple(
            max(1, round(size * weight)) if size else 0
            for size, weight in zip(self.sizes, self.weights, strict=True)
        )

    @property
    def epoch_size(self) -> int:
        """Samples in an epoch."""
        return sum(self.shares)

    def locate(self, start: int, count: int) -> list[tuple[int, int]]:
        """(part, window) of samples start, start+1, ... start+count-1 of the run."""
        epochs, slots = np.divmod(np.arange(start, start + count), self.epoch_size)
        places = np.empty_like(slots)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            places[here] = permute(slots[here], self.epoch_size, self.seed, int(epoch))
        ends = np.cumsum(self.shares)
        parts = np.searchsorted(ends, places, side="right")
        sequences = np.empty_like(slots)
        for part in np.unique(parts):
            share, size, here = self.shares[part], self.sizes[part], parts == part
            turns, within = np.divmod(
                epochs[here] * share + places[here] - (ends[part] - share), size
            )
            found = np.empty_like(within)
            for turn in np.unique(turns):
                now = turns == turn
                found[now] = permute(within[now], size, self.seed, int(part) + 1, int(turn))
            sequences[here] = found
        return list(zip(parts.tolist(), sequences.tolist(), strict=True))
