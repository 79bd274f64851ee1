"""Data order: the source and the sequence of each sample of a run.

Invariant: the order is a pure function of (seed, position in the run). It does not depend
on the number of processes, the micro-batch size, or interruptions of the run. So the data position
of a checkpoint is one integer.

Algorithm: no index list is shuffled in memory. `permute` computes the image of single indices
under a pseudorandom permutation of 0..n-1. A keyed Feistel network permutes the 2^(2k) values that
have 2k bits (Luby and Rackoff 1988, "How to construct pseudorandom permutations"). An image of n or
more is permuted again until it is below n (Black and Rogaway 2002, "Ciphers with arbitrary finite
domains": cycle walking).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8  # small domains need more than the four rounds of Luby and Rackoff


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64 bits: the finalizer of SplitMix64 (Steele et al. 2014)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def permute(indices: NDArray[np.int64], size: int, *key: int) -> NDArray[np.int64]:
    """Return the images of `indices` under the permutation of 0..size-1 that `key` selects.

    Each index must be in 0..size-1. The shape is kept.
    """
    # --8<-- [start:permute]
    half = np.uint64(max(4, (max(size - 1, 1).bit_length() + 1) // 2))  # bits of each Feistel half
    low = np.uint64((1 << int(half)) - 1)
    with np.errstate(over="ignore"):
        seed = np.zeros(1, np.uint64)
        for part in key:
            seed = _mix(seed + np.uint64(part) + np.uint64(0x9E3779B97F4A7C15))
        values = np.asarray(indices).astype(np.uint64)
        outside = np.ones(values.shape, bool)
        while outside.any():
            left, right = values[outside] >> half, values[outside] & low
            for round_number in range(_ROUNDS):
                left, right = right, left ^ (_mix(right + seed + np.uint64(round_number)) & low)
            values[outside] = (left << half) | right
            outside = values >= np.uint64(size)
    return values.astype(np.int64)
    # --8<-- [end:permute]


@dataclass(frozen=True)
class Order:
    """Data order of a weighted mixture of sources.

    sizes[s]: number of sequences of source s. weights[s]: how often an epoch of the mixture
    contains each of them. If an epoch ends within a pass over a source, the next epoch
    continues that pass. So over many epochs all sequences of a source are sampled equally often.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int

    @property
    def samples_per_source(self) -> tuple[int, ...]:
        """Number of samples that an epoch takes from each source."""
        return tuple(
            max(1, round(size * weight)) if size else 0
            for size, weight in zip(self.sizes, self.weights, strict=True)
        )

    @property
    def epoch_size(self) -> int:
        """Number of samples in an epoch."""
        return sum(self.samples_per_source)

    def locate(self, start: int, count: int) -> list[tuple[int, int]]:
        """Return (source, index of the sequence) of samples start..start+count-1 of the run."""
        epochs, offsets = np.divmod(np.arange(start, start + count), self.epoch_size)
        slots = np.empty_like(offsets)  # shuffled offset within the epoch
        for epoch in np.unique(epochs):
            selected = epochs == epoch
            slots[selected] = permute(offsets[selected], self.epoch_size, self.seed, int(epoch))
        # Source 0 owns the first slots of an epoch, source 1 the next, and so on.
        slot_ends = np.cumsum(self.samples_per_source)
        sources = np.searchsorted(slot_ends, slots, side="right")
        indices = np.empty_like(offsets)
        for source in np.unique(sources):
            selected = sources == source
            share, size = self.samples_per_source[source], self.sizes[source]
            draws = epochs[selected] * share + slots[selected] - (slot_ends[source] - share)
            passes, within = np.divmod(draws, size)  # passes over the source since the run began
            permuted = np.empty_like(within)
            for number in np.unique(passes):
                same = passes == number
                permuted[same] = permute(
                    within[same], size, self.seed, int(source) + 1, int(number)
                )
            indices[selected] = permuted
        return list(zip(sources.tolist(), indices.tolist(), strict=True))
