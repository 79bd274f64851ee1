"""Loading a model directory for inference."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from minimind.config.model import RopeKind
from minimind.errors import UsageError
from minimind.model import (
    Transformer,
    load_model,
    merge_adapter,
    read_config,
    resolve_adapter_directory,
    resolve_model_directory,
)
from minimind.model.device import choose_device, multiplies_bf16
from minimind.tokenizer import Tokenizer


def load_for_inference(
    path: Path,
    device: str = "auto",
    *,
    adapter: Path | None = None,
    dtype: torch.dtype | None = None,
    context: int | None = None,
    rope_scaling: RopeKind | None = None,
) -> tuple[Transformer, Tokenizer]:
    """Load the model and the tokenizer of a model or run directory.

    adapter: LoRA adapter or its run directory, merged into the weights.
    dtype: None = the fastest on the device.
    context: extends the model's context with RoPE scaling when longer than the trained one. To
        shorten the context, pass it to the engine as well.
    rope_scaling: None = the kind that measured best.

    Raises ResourceError for a missing device, ModelError for an invalid model or adapter, and
    TokenizerError when the tokenizer is broken or does not match the model.
    """
    chosen = choose_device(device)
    directory = resolve_model_directory(path)
    tokenizer, config = Tokenizer.load(directory), read_config(directory)
    tokenizer.check_model(directory, config.vocab_size)
    if rope_scaling and (context is None or context <= config.max_position_embeddings):
        raise UsageError(
            f"RoPE scaling ({rope_scaling}) needs a longer context than the "
            f"{config.max_position_embeddings:,} tokens of {directory}; give such a context, or "
            "no scaling"
        )
    dtype = dtype or inference_dtype(chosen)
    with single_threaded():
        if adapter is None:
            model = load_model(directory, device=chosen, dtype=dtype)
        else:
            model = load_model(directory, device=chosen)
            merge_adapter(model, resolve_adapter_directory(adapter))
            model = model.to(dtype)
    if context is not None:
        model.extend_context(context, rope_scaling)
    return model.eval(), tokenizer


@contextmanager
def single_threaded() -> Iterator[None]:
    """Keep OpenMP from starting a thread pool for the current thread.

    OpenMP keeps a pool per calling thread. With more pool threads than cores it puts them to sleep
    between any two matrix products instead of spinning, and an engine step takes twice as long. A
    thread that loads a model must therefore not have a pool in addition to the engine's.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def inference_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where the hardware multiplies it, else float32.

    Measured in benchmarks/records/decoding-speed.md.
    """
    can_pack = device.type != "cpu" or torch.backends.mkldnn.is_available()
    return torch.bfloat16 if can_pack and multiplies_bf16(device) else torch.float32
