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
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
        ),
    ],
)
def test_the_same_numbers_as_tensors(device: str) -> None:
    tokens = np.arange(6).reshape(2, 3)
    labels = np.where(tokens % 2, tokens, IGNORED)
    segments = np.array([[0, 0, 1], [0, 1, 1]], np.int32)
    batch = to_device(Batch(tokens, labels, segments, range(4, 6)), torch.device(device))
    assert (batch.tokens.dtype, batch.labels.dtype) == (torch.int64, torch.int64)
    assert batch.tokens.tolist() == tokens.tolist()
    assert batch.labels.tolist() == labels.tolist()
    assert batch.segments is not None
    assert batch.segments.tolist() == segments.tolist()
    assert batch.learned.tolist() == [1, 3, 5]
    assert {batch.tokens.device.type, batch.learned.device.type} == {device}


def test_running_text_has_no_segments() -> None:
    rows = np.zeros((1, 2), np.int64)
    batch = to_device(Batch(rows, rows, None, range(1)), CPU)
    assert batch.segments is None and batch.num_tokens == 2


def test_padding_is_not_counted() -> None:
    """It is the last segment of its window; a conversation may begin and end without labels."""
    segments = np.array([[0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1]], np.int32)
    labels = np.full((3, 6), IGNORED)
    labels[0, 1] = labels[0, 2] = labels[1, 5] = labels[2, 1] = 7
    batch = to_device(Batch(segments * 0, labels, segments, range(3)), CPU)
    assert batch.num_tokens == 4 + 6 + 4


class Watched(MixedDataset):
    """Notes what is built and in which thread; waits for `gates[start]` where there is one."""

    def __init__(self) -> None:
        super().__init__([TextSequences([text_shard()], 32)], [1.0], seed=0)
        self.begun: list[tuple[int, int]] = []
        self.threads: set[threading.Thread] = set()
        self.gates: dict[int, threading.Event] = {}
        self.bad: set[int] = set()

    def batch(self, start: int, count: int) -> Batch:
        self.begun.append((start, count))
        self.threads.add(threading.current_thread())
        if start in self.gates:
            self.gates[start].wait()
        if start in self.bad:
            raise DataError(f"shard {start} is damaged")
        return super().batch(start, count)


def test_one_batch_is_built_ahead_in_a_thread() -> None:
    mix = Watched()
    mix.gates = {start: threading.Event() for start in (2, 4)}
    with closing(Prefetcher(mix)) as batches:
        assert batches.batch((0, 2), (2, 2)).samples == range(2)  # although the next one waits
        mix.gates[2].set()
        assert batches.batch((2, 2), (4, 2)).samples == range(2, 4)
        mix.gates[4].set()
        assert batches.batch((4, 2), None).samples == range(4, 6)
    assert mix.begun == [(0, 2), (2, 2), (4, 2)]
    [thread] = mix.threads
    assert thread is not threading.main_thread() and not thread.is_alive()


def test_another_batch_than_the_one_foreseen_is_built() -> None:
    """Memory ran out: the same samples come again, fewer at once."""
    mix = Watched()
    with closing(Prefetcher(mix)) as batches:
        batches.batch((0, 4), (4, 4))
        again = batches.batch((0, 2), (2, 2))
        assert again.samples == range(2)
        assert again.tokens.tolist() == mix.batch(0, 2).tokens.tolist()
        assert batches.batch((2, 2), None).samples == range(2, 4)


def test_an_error_comes_with_the_batch_that_has_it() -> None:
    mix = Watched()
    mix.bad = {2, 4}
    with closing(Prefetcher(mix)) as batches:
        batches.batch((0, 2), (2, 2))
        with pytest.raises(DataError, match="shard 2 is damaged"):
            batches.batch((2, 2), (4, 2))
        batches.batch((0, 2), (4, 2))  # closed without asking for what failed


@pytest.mark.parametrize("objective", ["pretrain", "sft", "dpo"])
def test_prefetched_batches_are_those_of_the_mix(objective: str, tmp_path: Path) -> None:
    mix = nano_trainer(tmp_path, objective).data
    parts = [(start, 3) for start in range(0, 60, 3)]
    with closing(Prefetcher(mix)) as batches:
        for part, following in zip(parts, [*parts[1:], None], strict=True):
            found, wanted = (
                to_device(batch, CPU)
                for batch in (batches.batch(part, following), mix.batch(*part))
            )
            assert torch.equal(found.tokens, wanted.tokens)
            assert torch.equal(found.labels, wanted.labels)
            assert found.num_tokens == wanted.num_tokens
