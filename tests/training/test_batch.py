import numpy as np
import torch

from minimind.data.packing import IGNORED, Batch
from minimind.training.batch import to_device


def test_the_same_numbers_as_tensors() -> None:
    tokens = np.arange(6).reshape(2, 3)
    labels = np.where(tokens % 2, tokens, IGNORED)
    segments = np.array([[0, 0, 1], [0, 1, 1]], np.int32)
    batch = to_device(Batch(tokens, labels, segments, range(4, 6)), torch.device("cpu"))
    assert (batch.tokens.dtype, batch.labels.dtype) == (torch.int64, torch.int64)
    assert batch.tokens.tolist() == tokens.tolist()
    assert batch.labels.tolist() == labels.tolist()
    assert batch.segments is not None
    assert batch.segments.tolist() == segments.tolist()
    assert batch.learned.tolist() == [1, 3, 5]


def test_running_text_has_no_segments() -> None:
    rows = np.zeros((1, 2), np.int64)
    assert to_device(Batch(rows, rows, None, range(1)), torch.device("cpu")).segments is None
