"""Steps of one token a text as CUDA graphs.

A step of a small model is a few hundred kernels, each of which is over sooner than Python starts
the next one; a graph starts them all at once.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minimind.inference.batched_model import BatchedModel, Part

_SHORTEST = 256  # positions that attention spans at the least: fewer would save no time


@dataclass(frozen=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    inputs: Tensor  # [2, slots] int64: tokens, positions
    logits: Tensor  # [slots, vocab]


class GraphedModel:
    """Does what a BatchedModel does, on an NVIDIA GPU with single tokens as graphs.

    There is one for each number of slots and each span of attention, powers of two, recorded when
    it is needed first. Where they do not work, a warning says so and steps are as without.
    """

    def __init__(self, model: BatchedModel) -> None:
        self._model = model
        self._recorded: dict[tuple[int, int], _Recorded] = {}
        self._pool: Any = None  # of memory, one for all: they never run at once
        self._works = model.device.type == "cuda"

    def forward(self, singles: Sequence[Part], chunks: Sequence[Part]) -> Tensor:
        """As BatchedModel.forward."""
        alike = all(self._model.reads_alike(part.text_length) for part in singles)
        if not (self._works and singles and alike):
            return self._model.forward(singles, chunks)
        try:
            written = self._step(singles)
        except RuntimeError as error:  # an old driver, say, or no memory left to record with
            reason = str(error).split("\n")[0]
            warnings.warn(
                f"CUDA graphs do not work here; writing is slower: {reason}", stacklevel=2
            )
            self._works = False
            return self._model.forward(singles, chunks)
        return torch.cat((written, self._model.forward([], chunks))) if chunks else written

    def _step(self, singles: Sequence[Part]) -> Tensor:
        slots, span = frame(self._model, singles)
        recorded = self._recorded.get((slots, span)) or self._record(slots, span)
        recorded.inputs.copy_(torch.tensor(rows_of(self._model, singles, slots)))
        recorded.graph.replay()
        chosen = torch.tensor([part.slot for part in singles], device=self._model.device)
        return recorded.logits[chosen]

    def _record(self, slots: int, span: int) -> _Recorded:
        """Once without recording, for libraries set themselves up in their first call."""
        self._model.prepare_steps()
        idle = rows_of(self._model, (), slots)
        with torch.cuda.device(self._model.device):
            inputs = torch.tensor(idle, device=self._model.device)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._model.step(inputs[0], inputs[1], span)
            torch.cuda.current_stream().wait_stream(stream)
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the device meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                logits = self._model.step(inputs[0], inputs[1], span)
        self._recorded[slots, span] = _Recorded(graph, inputs, logits)
        return self._recorded[slots, span]


def frame(model: BatchedModel, singles: Sequence[Part]) -> tuple[int, int]:
    """How many slots, and what span of positions, a graph for these has."""
    slots = 1 << max(part.slot for part in singles).bit_length()
    longest = max(part.start for part in singles) + 1
    span = max(_SHORTEST, 1 << (longest - 1).bit_length())
    return min(slots, model.slots), min(span, model.positions)


def rows_of(model: BatchedModel, singles: Sequence[Part], slots: int) -> list[list[int]]:
    """Tokens and positions of all slots; where nobody writes, at a position that no text has."""
    tokens, positions = [0] * slots, [model.context] * slots
    for part in singles:
        (tokens[part.slot],) = part.tokens
        positions[part.slot] = part.start
    return [tokens, positions]
