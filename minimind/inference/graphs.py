"""CUDA graphs of the decode step.

A decode step of a small model is a few hundred kernels, each of which finishes before Python
launches the next one. A graph launches all of them together.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minimind.inference.batched_model import BatchedModel, Part

_MIN_SPAN = 256  # positions; attention to fewer would save no time


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    inputs: Tensor  # [2, slots] int64: tokens, positions
    logits: Tensor  # [slots, vocab]


class GraphedModel:
    """A BatchedModel that decodes with CUDA graphs on an NVIDIA GPU, and as usual elsewhere.

    A graph is captured per number of slots and attention span, both rounded up to powers of two,
    when it is first needed. If capture fails, a warning is issued and decoding runs without graphs.
    """

    def __init__(self, model: BatchedModel) -> None:
        self._model = model
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._pool: Any = None  # memory shared by all graphs, which never run concurrently
        self._enabled = model.device.type == "cuda"

    def forward(self, decode: Sequence[Part], prefill: Sequence[Part]) -> Tensor:
        """Return the logits of `BatchedModel.forward`."""
        cacheable = all(self._model.prefix_cacheable(part.sequence_length) for part in decode)
        if not (self._enabled and decode and cacheable):
            return self._model.forward(decode, prefill)
        try:
            logits = self._decode(decode)
        except RuntimeError as error:  # for example an old driver, or no memory left for a graph
            reason = str(error).split("\n")[0]
            warnings.warn(
                f"CUDA graphs do not work here, so decoding is slower: {reason}", stacklevel=2
            )
            self._enabled = False
            return self._model.forward(decode, prefill)
        return torch.cat((logits, self._model.forward([], prefill))) if prefill else logits

    def _decode(self, parts: Sequence[Part]) -> Tensor:
        slots, span = graph_shape(self._model, parts)
        graph = self._graphs.get((slots, span)) or self._capture(slots, span)
        graph.inputs.copy_(torch.tensor(graph_inputs(self._model, parts, slots)))
        graph.graph.replay()
        used = torch.tensor([part.slot for part in parts], device=self._model.device)
        return graph.logits[used]

    def _capture(self, slots: int, span: int) -> _Graph:
        """Capture a graph, after a run outside of it in which libraries initialize themselves."""
        self._model.prepare_decode()
        idle = graph_inputs(self._model, (), slots)
        with torch.cuda.device(self._model.device):
            inputs = torch.tensor(idle, device=self._model.device)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._model.decode(inputs[0], inputs[1], span)
            torch.cuda.current_stream().wait_stream(stream)
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # thread_local: other threads may use the device meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                logits = self._model.decode(inputs[0], inputs[1], span)
        self._graphs[slots, span] = _Graph(graph, inputs, logits)
        return self._graphs[slots, span]


def graph_shape(model: BatchedModel, parts: Sequence[Part]) -> tuple[int, int]:
    """Return the number of slots and the attention span of the graph that decodes these parts."""
    slots = 1 << max(part.slot for part in parts).bit_length()
    longest = max(part.start for part in parts) + 1
    span = max(_MIN_SPAN, 1 << (longest - 1).bit_length())
    return min(slots, model.slots), min(span, model.cache.positions)


def graph_inputs(model: BatchedModel, parts: Sequence[Part], slots: int) -> list[list[int]]:
    """Return tokens and positions, [2, slots]; unused slots write beyond the context."""
    tokens, positions = [0] * slots, [model.context] * slots
    for part in parts:
        (tokens[part.slot],) = part.tokens
        positions[part.slot] = part.start
    return [tokens, positions]
