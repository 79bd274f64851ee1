import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from minimind.data.packing import IGNORED, Batch, MixedDataset, TextSequences
from minimind.errors import DataError
from minimind.training.batch import Prefetcher, to_device
from tests.support.small_runs import nano_trainer, text_shard

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
def test_to_device_copies_a_batch_as_tensors(device: str) -> None:
    tokens = np.arange(6).reshape(2, 3)
    labels = np.where(tokens % 2, tokens, IGNORED)
    segments = np.array([[0, 0, 1], [0, 1, 1]], np.int32)
    batch = to_device(Batch(tokens, labels, segments, range(4, 6)), torch.device(device))
    assert (batch.tokens.dtype, batch.labels.dtype) == (torch.int64, torch.int64)
    assert batch.tokens.tolist() == tokens.tolist()
    assert batch.labels.tolist() == labels.tolist()
    assert batch.segments is not None
    assert batch.segments.tolist() == segments.tolist()
    assert batch.label_indices.tolist() == [1, 3, 5]
    assert {batch.tokens.device.type, batch.label_indices.device.type} == {device}


def test_text_has_no_segments() -> None:
    rows = np.zeros((1, 2), np.int64)
    batch = to_device(Batch(rows, rows, None, range(1)), CPU)
    assert batch.segments is None and batch.num_tokens == 2


def test_num_tokens_leaves_out_padding() -> None:
    """Padding is the last segment; a conversation may begin and end without labels."""
    segments = np.array([[0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1]], np.int32)
    labels = np.full((3, 6), IGNORED)
    labels[0, 1] = labels[0, 2] = labels[1, 5] = labels[2, 1] = 7
    batch = to_device(Batch(segments * 0, labels, segments, range(3)), CPU)
    assert batch.num_tokens == 4 + 6 + 4


class RecordedDataset(MixedDataset):
    """Notes what is built and in which thread; waits for `gates[start]` where there is one."""

    def __init__(self) -> None:
        super().__init__([TextSequences([text_shard()], 32)], [1.0], seed=0)
        self.started: list[tuple[int, int]] = []
        self.threads: set[threading.Thread] = set()
        self.gates: dict[int, threading.Event] = {}
        self.damaged: set[int] = set()

    def batch(self, start: int, count: int) -> Batch:
        self.started.append((start, count))
        self.threads.add(threading.current_thread())
        if start in self.gates:
            self.gates[start].wait()
        if start in self.damaged:
            raise DataError(f"shard {start} is damaged")
        return super().batch(start, count)


def test_one_batch_is_prefetched_in_a_thread() -> None:
    dataset = RecordedDataset()
    dataset.gates = {start: threading.Event() for start in (2, 4)}
    with closing(Prefetcher(dataset)) as batches:
        assert batches.batch((0, 2), (2, 2)).samples == range(2)  # although the next one is blocked
        dataset.gates[2].set()
        assert batches.batch((2, 2), (4, 2)).samples == range(2, 4)
        dataset.gates[4].set()
        assert batches.batch((4, 2), None).samples == range(4, 6)
    assert dataset.started == [(0, 2), (2, 2), (4, 2)]
    [thread] = dataset.threads
    assert thread is not threading.main_thread() and not thread.is_alive()


def test_other_samples_than_the_prefetched_ones() -> None:
    """After running out of memory the same samples come again in smaller batches."""
    dataset = RecordedDataset()
    with closing(Prefetcher(dataset)) as batches:
        batches.batch((0, 4), (4, 4))
        again = batches.batch((0, 2), (2, 2))
        assert again.samples == range(2)
        assert again.tokens.tolist() == dataset.batch(0, 2).tokens.tolist()
        assert batches.batch((2, 2), None).samples == range(2, 4)


def test_error_is_raised_with_its_batch() -> None:
    dataset = RecordedDataset()
    dataset.damaged = {2, 4}
    with closing(Prefetcher(dataset)) as batches:
        batches.batch((0, 2), (2, 2))
        with pytest.raises(DataError, match="shard 2 is damaged"):
            batches.batch((2, 2), (4, 2))
        batches.batch((0, 2), (4, 2))  # the failed prefetch is dropped


@pytest.mark.parametrize("objective", ["pretrain", "sft", "dpo"])
def test_prefetched_batches_equal_those_of_the_dataset(objective: str, tmp_path: Path) -> None:
    dataset = nano_trainer(tmp_path, objective).data
    parts = [(start, 3) for start in range(0, 60, 3)]
    with closing(Prefetcher(dataset)) as batches:
        for part, following in zip(parts, [*parts[1:], None], strict=True):
            actual, expected = (
                to_device(batch, CPU)
                for batch in (batches.batch(part, following), dataset.batch(*part))
            )
            assert torch.equal(actual.tokens, expected.tokens)
            assert torch.equal(actual.labels, expected.labels)
            assert actual.num_tokens == expected.num_tokens
