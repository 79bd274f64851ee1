"""Estimate the memory of a training step and choose the micro-batch size that fits."""

import gc
import sys
from dataclasses import dataclass

import torch

from minimind.config.model import ModelConfig
from minimind.errors import ResourceError
from minimind.training.objectives.next_token import LOGIT_CHUNK
from minimind.training.reporter import pluralize
from minimind.units import format_memory

# Bytes of activations, fitted to measurements on a CPU in bf16. Estimates are off by at most a
# third (benchmarks/records/memory.md).
_PER_HIDDEN = 26  # per token, layer and unit of the hidden size
_PER_INTERMEDIATE = 8  # per token, layer and unit of the active intermediate size
_PER_ROUTED = 12  # per token, layer and unit of the hidden states sent to routed experts
_PER_SCORE = 3  # per attention score and layer, where scores are materialised
_PER_LOGIT = 16  # per logit of a chunk: the logits and their gradient
_MAX_MICRO_BATCH_TOKENS = {"cpu": 8192, "cuda": 32768, "mps": 8192}  # larger is no faster


@dataclass(frozen=True)
class Footprint:
    """The quantities that determine the memory of a training step."""

    config: ModelConfig
    parameters: int
    trained_parameters: int
    moments: int  # elements of the optimizer state
    seq_len: int
    device_type: str
    activation_checkpointing: bool = False
    stores_scores: bool = False  # attention scores: on a CPU without the kernels of model/fused.py
    # ZeRO (Rajbhandari et al. 2020): stage 1 divides the optimizer state among the processes, stage
    # 2 also the gradients, stage 3 also the weights; rank 0 keeps a full copy of them as well.
    zero_stage: int = 0
    num_processes: int = 1

    def components(self, micro_batch: int) -> dict[str, int]:
        """Estimate the bytes of each component for micro-batches of `micro_batch` sequences."""
        config, tokens = self.config, micro_batch * self.seq_len
        scores = config.num_attention_heads * self.seq_len if self.stores_scores else 0
        routed = config.num_experts_per_tok * config.hidden_size if config.num_local_experts else 0
        layer = _PER_HIDDEN * config.hidden_size + _PER_INTERMEDIATE * (
            config.active_intermediate_size
        )
        layer += _PER_ROUTED * routed + _PER_SCORE * scores
        per_token, cast_bytes = config.num_hidden_layers * layer, 4
        if self.activation_checkpointing:
            # The inputs of all layers; activations and gradients of the layer in the backward pass.
            per_token = 4 * config.num_hidden_layers * config.hidden_size + 2 * layer
            cast_bytes = 2
        weights = 4 * self.parameters
        if self.zero_stage == 3:
            weights += weights // self.num_processes
        # Saving copies tensors to host memory, which a discrete GPU does not share.
        copied = 0 if self.device_type == "cuda" else self.trained_parameters + self.moments
        return {
            "weights": weights,
            "gradients": 4 * self.trained_parameters // self._num_shards(2),
            "optimizer": 4 * self.moments // self._num_shards(1),
            "half-precision copies": cast_bytes * self.parameters,
            "checkpoint copy": 4 * copied,
            "activations": tokens * per_token,
            "logits": _PER_LOGIT * config.vocab_size * min(tokens, LOGIT_CHUNK),
        }

    def _num_shards(self, stage: int) -> int:
        """Return the number of processes that share what ZeRO divides from `stage` on."""
        return self.num_processes if self.zero_stage >= stage else 1

    def total(self, micro_batch: int) -> int:
        """Estimate the bytes of all components together."""
        return sum(self.components(micro_batch).values())

    def largest_micro_batch(self, num_sequences: int, memory: int | None) -> int | None:
        """Return the largest divisor of `num_sequences` that fits into `memory` bytes.

        memory: None means no limit. Sizes beyond which the device gets no faster are not chosen.
        Returns None if not even one sequence fits.
        """
        limit = max(1, _MAX_MICRO_BATCH_TOKENS[self.device_type] // self.seq_len)
        for micro_batch in divisors(num_sequences):
            if micro_batch <= limit and (memory is None or self.total(micro_batch) <= memory):
                return micro_batch
        return None


def divisors(number: int) -> list[int]:
    """Return the divisors of a number, largest first."""
    return [n for n in range(number, 0, -1) if number % n == 0]


def choose_micro_batch(
    footprint: Footprint,
    *,
    requested: int | None,
    saved: int | None = None,
    num_sequences: int,
    device: torch.device,
    free: int | None,
    processes_per_device: int = 1,
) -> int:
    """Return the micro-batch size: the requested one, or the largest that fits and is fast.

    requested: `training.micro_batch_size`. saved: the micro-batch size in the checkpoint that is
    resumed; the result is then the smallest of saved, requested and fitting.
    num_sequences: sequences per process and optimizer step; the result divides it.
    free: bytes free on the device before the model is loaded, shared by `processes_per_device`;
    None if unknown.
    Raises ResourceError, with a suggestion that would fit, if memory does not suffice.
    """
    free = None if free is None else free // processes_per_device
    fitting = footprint.largest_micro_batch(num_sequences, free)
    if saved:
        wanted = min(saved, requested or saved)
        if free is None or footprint.total(wanted) <= free:
            return wanted
        if fitting:
            return min(fitting, wanted)
    if free is None or (requested is None and fitting):
        return requested or fitting or 1
    micro_batch = 1 if saved else requested or 1
    if footprint.total(micro_batch) <= free:
        return micro_batch
    needed = format_memory(footprint.total(micro_batch))
    raise ResourceError(
        f"too little memory on {device}: a micro-batch of {pluralize(micro_batch, 'sequence')} of "
        f"{footprint.seq_len} tokens needs about {needed}, and "
        f"{format_memory(free)} are free; {_suggestion(footprint, fitting, resumed=bool(saved))}"
    )


def _suggestion(footprint: Footprint, fitting: int | None, *, resumed: bool) -> str:
    """Suggest settings that fit. A resumed run cannot change its model or sequence length."""
    recompute = "" if footprint.activation_checkpointing else "training.activation_checkpointing"
    if resumed:
        return "free some memory" + f", or try {recompute}=true" * bool(recompute)
    if fitting:
        return f"training.micro_batch_size={fitting} would fit"
    smaller = "a smaller model (model.preset) or a shorter data.seq_len"
    return f"try {recompute}=true, {smaller}" if recompute else f"try {smaller}"


def peak_bytes(device: torch.device) -> int | None:
    """Return the peak memory use in bytes, without synchronising with the device.

    On CUDA: of tensors, since `reset_peak`. Elsewhere: of the process, since its start; None where
    the system does not report it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def release_unused(device: torch.device) -> None:
    """Free reference cycles, and PyTorch's cached GPU memory, which cuBLAS and NCCL cannot use."""
    gc.collect()
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).empty_cache()


def reset_peak(device: torch.device) -> None:
    """Restart the measurement of `peak_bytes`; possible on CUDA only."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
