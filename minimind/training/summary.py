"""The results of a run, as `summary.json` records them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minimind.data.packing import MixedDataset
from minimind.tokenizer import Tokenizer
from minimind.training.build import count_parameters
from minimind.training.datasets import Stores
from minimind.training.memory import peak_bytes
from minimind.training.state import TrainingResult
from minimind.training.trainer import Trainer


def summarize(trainer: Trainer, result: TrainingResult) -> dict[str, Any]:
    """Return the size of the model, the cost of training and the validation metrics."""
    summary: dict[str, Any] = {
        "objective": trainer.recipe.objective,
        "parameters": count_parameters(trainer.model),
        "trained_parameters": count_parameters(trainer.model, trained=True),
        "steps": result.steps,
        "tokens": result.tokens,
        "seconds": result.elapsed_s,
        "tokens_per_second": result.tokens / max(result.elapsed_s, 1e-9),
        "device": str(trainer.device),
        "precision": trainer.precision.name,
        "peak_memory_bytes": peak_bytes(trainer.device),
    }
    if (active := trainer.model.num_active_parameters) < summary["parameters"]:
        summary["active_parameters"] = active
    if trainer.recipe.lora:
        summary["base"] = trainer.recipe.model.init
    first = {f"first_{name}": value for name, value in result.initial_validation.items()}
    best = result.best and {
        "best_step": result.best["step"],
        f"best_{result.best['metric']}": result.best["value"],
    }
    return summary | first | result.validation | best


def unigram_baseline(trainer: Trainer, stores: Stores, tokenizer: Tokenizer) -> dict[str, float]:
    """Return the bits per byte of a unigram model, a baseline for pretraining; {} otherwise.

    This reads much of the training data, so it is computed only when a run is finished.
    """
    if trainer.recipe.objective != "pretrain" or trainer.validation_data is None:
        return {}
    counts = sum(
        source.weight * store.unigram_counts(tokenizer.vocab_size)
        for source, store in zip(trainer.recipe.data.sources, stores.sources, strict=True)
    )
    num_sequences = trainer.recipe.validation.num_sequences
    bits = unigram_bits_per_byte(
        np.asarray(counts), trainer.validation_data, num_sequences, tokenizer.token_bytes
    )
    return {"unigram_bits_per_byte": bits}


def unigram_bits_per_byte(
    counts: NDArray[np.float64],
    validation_data: MixedDataset,
    num_sequences: int,
    token_bytes: Sequence[int],
) -> float:
    """Return the bits per byte of a unigram model on held-out sequences.

    A unigram model predicts each token with its frequency in the training text, without context.
    counts: [vocab_size] occurrences in an epoch, to which 1 is added (Laplace smoothing).
    token_bytes: [vocab_size] UTF-8 bytes per token; tokens of 0 bytes are not counted.
    """
    bits = -np.log2((counts + 1) / (counts.sum() + len(counts)))  # [vocab_size]
    num_bytes = np.asarray(token_bytes)
    labels = validation_data.batch(
        0, min(num_sequences, validation_data.order.epoch_size)
    ).labels.reshape(-1)
    tokens = labels[num_bytes[labels] > 0]
    return float(bits[tokens].sum() / num_bytes[tokens].sum())
