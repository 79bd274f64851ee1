"""How much memory a step takes, and how many windows at once fit."""

from pathlib import Path

import torch

from minimind.config.model import ModelConfig
from minimind.errors import ResourceError

# Bytes, measured on a CPU in bf16 within a third: benchmarks/records/memory.md.
_PER_PARAMETER = 20  # weights, gradient, moments, a copy in half precision
_PER_COPY = 12  # weights and moments again, while a checkpoint of them is written
_PER_WIDTH = 26  # what backward needs of a token in a layer, for each unit of the model's width
_PER_INNER = 8  # for each unit of what feed-forward works in
_PER_ROUTED = 12  # and for each unit of a token's copy that goes to an expert and comes back
_PER_SCORE = 3  # and for each attention score, where scores are kept
_PER_LOGIT = 16 * 1024  # for each word: the logits of a chunk of tokens and their gradient
_TOKENS_AT_ONCE = {"cpu": 8192, "cuda": 32768, "mps": 8192}


def step_bytes(
    config: ModelConfig, num_parameters: int, tokens: int, window: int, device: torch.device
) -> int:
    """Estimate of what training takes with `tokens` of windows of `window` tokens at once."""
    scores = config.num_attention_heads * window if device.type == "cpu" else 0
    routed = config.num_experts_per_tok * config.hidden_size if config.num_local_experts else 0
    layer = _PER_WIDTH * config.hidden_size + _PER_INNER * config.active_intermediate_size
    layer += _PER_ROUTED * routed + _PER_SCORE * scores
    activations = tokens * config.num_hidden_layers * layer
    # The copy is in the machine's memory, which is the device's too but on a card of its own.
    fixed = _PER_PARAMETER + (0 if device.type == "cuda" else _PER_COPY)
    return fixed * num_parameters + activations + _PER_LOGIT * config.vocab_size


def choose_micro_batch(
    config: ModelConfig,
    num_parameters: int,
    *,
    asked: int | None,
    batch: int,
    window: int,
    device: torch.device,
    sharers: int = 1,
) -> int:
    """Windows at once: what is asked for, or the largest divisor of `batch` that is quick and fits.

    `sharers` processes share the device's memory.
    Raises ResourceError, with what would fit, when memory is too short.
    """
    free = free_bytes(device)
    free = None if free is None else free // sharers

    def fits(windows: int) -> bool:
        if free is None:
            return True
        return step_bytes(config, num_parameters, windows * window, window, device) <= free

    divisors = [n for n in range(batch, 0, -1) if batch % n == 0]
    most = max(1, _TOKENS_AT_ONCE[device.type] // window)
    chosen = asked or next((n for n in divisors if n <= most and fits(n)), 1)
    if fits(chosen):
        return chosen
    needed = step_bytes(config, num_parameters, chosen * window, window, device)
    fitting = next((n for n in divisors if fits(n)), None)
    advice = (
        f"training.micro_batch={fitting} would fit"
        if fitting
        else "take a smaller model (model.preset) or a shorter data.window"
    )
    raise ResourceError(
        f"too little memory on {device}: {chosen} windows of {window} tokens at once need about "
        f"{needed / 1e9:.1f} GB and {(free or 0) / 1e9:.1f} GB are free; {advice}"
    )


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be had on the device, None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return None
    free = next(int(x.split()[1]) << 10 for x in lines if x.startswith("MemAvailable"))
    try:  # a container may be allowed less; what it caches of files can be given back
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / f"memory.{x}").read_text("ascii") for x in ("max", "current"))
        stat = (group / "memory.stat").read_text("ascii").splitlines()
        cached = next(int(line.split()[1]) for line in stat if line.startswith("file "))
        return min(free, int(limit) - int(used) + cached)
    except (OSError, ValueError, StopIteration):
        return free
