# --8<-- [start:overload]
import heapq

from minimind.serving.admission import AdmissionQueue
from minimind.serving.errors import APIError


def first_refusal(rate, minutes=10):
    """Return the time of the first refused request, and how long the last one waited."""
    queue, ends, free, wait = AdmissionQueue(16, 64), [], [0.0] * 16, 0.0
    for number in range(rate * 60 * minutes):
        now = number / rate
        while ends and ends[0] <= now:
            heapq.heappop(ends)
            queue.release(4.0)
        try:
            queue.admit(1)
        except APIError:
            return now, wait
        start = max(now, heapq.heappop(free))  # in the slot that is free first
        wait = start - now
        for times in (free, ends):
            heapq.heappush(times, start + 4.0)
    return None, wait


assert first_refusal(rate=4) == (None, 0.0)  # 16 / 4
refused, waited = first_refusal(rate=5)
assert 60 < refused < 70 and 15 < waited < 17
# --8<-- [end:overload]


# --8<-- [start:q4]
import gguf
import numpy as np
from gguf.quants import dequantize, quantize


def store_q4(block):
    """Return the 32 values of a block as q4_0 gives them back."""
    largest = block[np.abs(block).argmax()]
    scale = largest / -8
    integers = np.clip(np.floor(block / scale + 8.5), 0, 15) - 8  # -8 … 7
    return np.float16(scale).astype(np.float32) * integers


block = np.random.default_rng(1).normal(size=32).astype(np.float32)
kind = gguf.GGMLQuantizationType.Q4_0
assert np.allclose(store_q4(block), dequantize(quantize(block, kind), kind))
# --8<-- [end:q4]


# --8<-- [start:outlier]
import gguf
import numpy as np
from gguf.quants import dequantize, quantize


def error_of_others(block):
    kind = gguf.GGMLQuantizationType.Q8_0
    return np.abs(dequantize(quantize(block, kind), kind) - block)[1:].mean()


block = np.random.default_rng(1).uniform(-1, 1, 32).astype(np.float32)
block[0] = 1.0
worse = block.copy()
worse[0] *= 100
assert 50 < error_of_others(worse) / error_of_others(block) < 110
# --8<-- [end:outlier]

# --8<-- [start:pairs]
import torch

from minimind.export.gguf import _pair_rows

torch.manual_seed(1)
x = torch.randn(2, 64)  # two tokens, of which the second is at position 3
query, key = torch.randn(2, 16, 64)  # the rows of one head
angles = 3 * 10_000 ** (-2 * torch.arange(8) / 16)


def turn(vector, pairs):
    """Rotate (vector[i], vector[j]) by its angle, for each of the pairs [8, 2]."""
    turned = vector.clone()
    a, b = vector[pairs[:, 0]], vector[pairs[:, 1]]
    turned[pairs[:, 0]] = a * angles.cos() - b * angles.sin()
    turned[pairs[:, 1]] = a * angles.sin() + b * angles.cos()
    return turned


def score(query, key, pairs):
    return turn(query @ x[1], pairs) @ (key @ x[0])  # the key is at position 0


halves = torch.arange(16).view(2, 8).T  # (0, 8), (1, 9), …
neighbours = torch.arange(16).view(8, 2)  # (0, 1), (2, 3), …
ours = score(query, key, halves)
reordered = score(_pair_rows(query, 1), _pair_rows(key, 1), neighbours)
assert torch.allclose(ours, reordered, rtol=1e-4)
assert not torch.allclose(ours, score(query, key, neighbours), rtol=0.01)
# --8<-- [end:pairs]

# --8<-- [start:overlap]
from minimind.inference.stop_strings import TextStream
from minimind.tokenizer import train_tokenizer

letters = train_tokenizer(["a b"], vocab_size=272)  # no merges: a token is a byte
stream, shown = TextStream(letters, stop=["aab"]), []
for letter in "aaab":
    stream.push(letters.encode(letter)[0])
    shown.append((stream.take() or ("",))[0])
assert shown == ["", "", "a", ""] and stream.stopped
assert stream.finish()[0] == ""
# --8<-- [end:overlap]
