"""How much memory a step takes, and how many windows at once fit."""

import gc
import sys
from dataclasses import dataclass

import torch

from minimind.config.model import ModelConfig
from minimind.errors import ResourceError
from minimind.training.objectives.next_token import LOGIT_CHUNK
from minimind.training.reporter import pluralize

# Bytes, measured on a CPU in bf16 within a third: benchmarks/records/memory.md.
_PER_WIDTH = 26  # what backward needs of a token in a layer, for each unit of the model's width
_PER_INNER = 8  # for each unit of what feed-forward works in
_PER_ROUTED = 12  # and for each unit of a token's copy that goes to an expert and comes back
_PER_SCORE = 3  # and for each attention score, where scores are kept
_PER_LOGIT = 16  # for each word and token of a chunk: the logits and their gradient
_TOKENS_AT_ONCE = {"cpu": 8192, "cuda": 32768, "mps": 8192}


@dataclass(frozen=True)
class Footprint:
    """What decides how much memory a step takes: a model's shape, and how it is trained."""

    config: ModelConfig
    parameters: int
    trained_parameters: int
    moments: int  # numbers that the optimizer keeps
    seq_len: int
    device_type: str
    activation_checkpointing: bool = False

    def parts(self, sequences: int) -> dict[str, int]:
        """Estimate, in bytes, of what a step takes with so many windows at once, by what it is."""
        config, tokens = self.config, sequences * self.seq_len
        scores = config.num_attention_heads * self.seq_len if self.device_type == "cpu" else 0
        routed = config.num_experts_per_tok * config.hidden_size if config.num_local_experts else 0
        layer = _PER_WIDTH * config.hidden_size + _PER_INNER * config.active_intermediate_size
        layer += _PER_ROUTED * routed + _PER_SCORE * scores
        kept, copied = config.num_hidden_layers * layer, 4
        if self.activation_checkpointing:
            # What goes into each layer; the inside of one and its gradient; its weights' copies.
            kept, copied = 4 * config.num_hidden_layers * config.hidden_size + 2 * layer, 2
        # A checkpoint is written from a copy in the machine's memory; a card has its own.
        saved = 0 if self.device_type == "cuda" else self.trained_parameters + self.moments
        return {
            "weights": 4 * self.parameters,
            "gradients": 4 * self.trained_parameters,
            "optimizer": 4 * self.moments,
            "copies in half precision": copied * self.parameters,
            "copy that is saved": 4 * saved,
            "activations": tokens * kept,
            "logits": _PER_LOGIT * config.vocab_size * min(tokens, LOGIT_CHUNK),
        }

    def total(self, sequences: int) -> int:
        """The sum of the parts."""
        return sum(self.parts(sequences).values())

    def fitting(self, batch: int, memory: int | None) -> int | None:
        """Windows at once: the largest divisor of `batch` that fits into `memory` bytes (None =
        no limit) and is not beyond what makes a device quick; None when not even one fits."""
        most = max(1, _TOKENS_AT_ONCE[self.device_type] // self.seq_len)
        for sequences in divisors(batch):
            if sequences <= most and (memory is None or self.total(sequences) <= memory):
                return sequences
        return None


def divisors(number: int) -> list[int]:
    """Largest first."""
    return [n for n in range(number, 0, -1) if number % n == 0]


def choose_micro_batch(
    footprint: Footprint,
    *,
    asked: int | None,
    batch: int,
    device: torch.device,
    free: int | None,
    processes_per_device: int = 1,
    saved: int | None = None,
) -> int:
    """Windows at once: what is asked for, or the largest divisor of `batch` that is quick and fits.

    `free`: bytes on the device before the model was there, None if unknown; `sharers` processes
    share them. `saved`: the micro-batch of the checkpoint from which the run is resumed: then the
    smallest of it, what is asked for and what fits is taken.
    Raises ResourceError, with what would fit, when memory is too short.
    """
    free = None if free is None else free // processes_per_device
    fitting = footprint.fitting(batch, free)
    if saved:
        wanted = min(saved, asked or saved)
        if free is None or footprint.total(wanted) <= free:
            return wanted
        if fitting:
            return min(fitting, wanted)
    if free is None or (asked is None and fitting):
        return asked or fitting or 1
    chosen = 1 if saved else asked or 1
    if footprint.total(chosen) <= free:
        return chosen
    if saved:
        advice = "free some memory"
        if not footprint.activation_checkpointing:
            advice += ", or try training.activation_checkpointing=true"
    elif fitting:
        advice = f"training.micro_batch_size={fitting} would fit"
    elif not footprint.activation_checkpointing:
        advice = (
            "try training.activation_checkpointing=true, "
            "a smaller model (model.preset) or a shorter data.seq_len"
        )
    else:
        advice = "take a smaller model (model.preset) or a shorter data.seq_len"
    raise ResourceError(
        f"too little memory on {device}: {pluralize(chosen, 'sequence')} of "
        f"{footprint.seq_len} tokens at once need{'s' * (chosen == 1)} about "
        f"{footprint.total(chosen) / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; {advice}"
    )


def peak_bytes(device: torch.device) -> int | None:
    """The most memory that was in use at once: of tensors on a GPU since `forget_peak`, elsewhere
    of the whole process since it began. None where the system does not tell. Waits for nothing."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # on Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most << 10


def release(device: torch.device) -> None:
    """Give back what nobody uses any more: what refers to itself in circles, if anything does, and
    what torch keeps of a GPU's memory to use it again, which cuBLAS and NCCL cannot have."""
    gc.collect()
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).empty_cache()


def forget_peak(device: torch.device) -> None:
    """Begin to measure anew, where that can be done."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
