"""Evaluation on held-out sequences during training."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from minimind.data.packing import MixedDataset
from minimind.model import Transformer
from minimind.training.batch import to_device
from minimind.training.batch_sizes import BatchSizes
from minimind.training.distributed import ProcessGroup
from minimind.training.objectives import Objective
from minimind.training.precision import Precision
from minimind.training.sums import LossSums


@dataclass(frozen=True)
class EvalSet:
    """Held-out sequences, and the objective that is evaluated on them."""

    objective: Objective
    datasets: list[MixedDataset]


def evaluate(
    model: Transformer,
    eval_sets: Mapping[str, EvalSet],
    num_sequences: int,
    *,
    sizes: BatchSizes,
    device: torch.device,
    precision: Precision,
    group: ProcessGroup,
    stop_requested: Callable[[], bool],
) -> dict[str, float] | None:
    """Compute metrics on up to `num_sequences` of each dataset; None if a stop was requested.

    The keys of `eval_sets` become prefixes of the metrics' names. Each rank of `group` evaluates
    its share, and all ranks return the same metrics.
    """

    def sum_losses(eval_set: EvalSet) -> LossSums | None:
        sums = LossSums()
        for dataset in eval_set.datasets:

            def compute(start: int, size: int, dataset: MixedDataset = dataset) -> LossSums:
                batch = to_device(dataset.batch(start, size), device)
                with precision.autocast():
                    return LossSums.of(eval_set.objective.loss(model, batch))

            count = min(num_sequences, dataset.order.epoch_size)
            for result in sizes.map_eval_batches(count, group, compute):
                if stop_requested():
                    return None
                if result:
                    sums.add(result)
        return sums

    metrics: dict[str, float] = {}
    model.eval()
    try:
        with torch.no_grad():
            for prefix, eval_set in eval_sets.items():
                if (sums := sum_losses(eval_set)) is None:
                    return None
                sums.add_missing_metrics(group, device)
                sums.all_reduce_(group, device)
                for name, value in sums.metrics(eval_set.objective).items():
                    metrics[f"{prefix}{name}"] = value
    finally:
        model.train()
    return metrics


def selection_metric(metrics: dict[str, float]) -> str:
    """Return the name of the metric that selects the best checkpoint; lower is better."""
    return "bits_per_byte" if "bits_per_byte" in metrics else "loss"


def is_better(metrics: dict[str, float], best: dict[str, Any]) -> bool:
    """True if validation metrics are finite and better than the best so far.

    False without metrics on held-out data: those on a retention set do not select a checkpoint.
    """
    value = metrics.get(selection_metric(metrics), math.nan)
    return math.isfinite(value) and (not best or value < best["value"])
