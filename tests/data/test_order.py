"""Data order is a pure function of seed and position."""

from collections import Counter

import numpy as np
import pytest

from minimind.data.order import Order, permute


@pytest.mark.parametrize("size", [1, 2, 3, 17, 256, 257, 5000])
def test_permute_is_a_permutation(size: int) -> None:
    images = permute(np.arange(size), size, 7, 0)
    assert sorted(images.tolist()) == list(range(size))


def test_permute_depends_on_each_part_of_its_key() -> None:
    images = [
        permute(np.arange(1000), 1000, *key).tolist() for key in [(0, 0), (0, 1), (1, 0), (1, 1)]
    ]
    assert len({tuple(image) for image in images}) == 4


@pytest.mark.parametrize("size", [10, 30, 100])
def test_permute_is_uniform(size: int) -> None:
    """Each index maps to each value equally often (chi-square per degree of freedom)."""
    times = 500
    counts = np.zeros((size, size))
    for key in range(times):
        counts[np.arange(size), permute(np.arange(size), size, key)] += 1
    expected = times / size
    chi = ((counts - expected) ** 2 / expected).sum() / max((size - 1) ** 2, 1)
    assert chi < 1.7


def test_each_sequence_is_sampled_in_proportion_to_the_weight_of_its_source() -> None:
    order = Order(sizes=(100, 50, 7), weights=(1.0, 0.5, 3.0), seed=5)
    assert order.samples_per_source == (100, 25, 21)
    counts = Counter(order.locate(0, 2 * order.epoch_size))
    for source, (size, times) in enumerate([(100, 2), (50, 1), (7, 6)]):
        assert [counts[source, index] for index in range(size)] == [times] * size


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_any_number_of_processes_reads_the_same_samples_from_any_cursor(
    processes: int,
) -> None:
    """The shards of a global batch, concatenated over ranks, are the samples of one process."""
    order = Order(sizes=(997, 313), weights=(1.0, 2.0), seed=11)
    batch, total = 12, 4_000  # two and a half epochs
    expected = order.locate(0, total + batch)
    share = batch // processes
    for cursor in range(0, total, batch):
        together = [
            sample
            for rank in range(processes)
            for sample in order.locate(cursor + rank * share, share)
        ]
        assert together == expected[cursor : cursor + batch]
    if processes == 1:
        singles = [order.locate(cursor, 1)[0] for cursor in range(0, total, 7)]
        assert singles == expected[:total:7]
