"""A model directory, made ready to write text."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from minimind.config.model import RopeKind
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
    """The model and the tokenizer of a model or run directory.

    dtype: None = what the device is fastest in. A LoRA adapter (or its run directory) is merged
    into the weights: it costs no time afterwards. context: tokens that the model is to read;
    where it was made for fewer, its positions are scaled, as `rope_scaling` says or in the best
    way that was measured. A shorter one is the engine's to keep to: give it there too.

    Raises ResourceError for a device that is not there, ModelError for what is no model or
    adapter, and TokenizerError when the tokenizer is broken or not that of the model.
    """
    chosen = choose_device(device)
    directory = resolve_model_directory(path)
    tokenizer, config = Tokenizer.load(directory), read_config(directory)
    tokenizer.check_model(directory, config.vocab_size)
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
    """Let torch work with one core, in this thread, so that it starts no helpers for it.

    OpenMP gives each thread that calls torch helpers of its own. Where there are more of them than
    cores they sleep between any two products instead of waiting at the ready, and an engine's step
    takes twice as long; so whoever loads a model must not have any when the engine works.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def inference_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it; benchmarks/records/decoding-speed.md: figures."""
    packs = device.type != "cpu" or torch.backends.mkldnn.is_available()
    return torch.bfloat16 if packs and multiplies_bf16(device) else torch.float32
