"""The learning rate over a run, as a share of its peak."""

import math

from minimind.config.settings import ScheduleSettings


def lr_fraction(step: int, num_steps: int, settings: ScheduleSettings) -> float:
    """Share of the peak at `step` (0 is the first): linear warmup, then cosine or WSD.

    Cosine: Loshchilov and Hutter 2017. WSD (warmup, stable, decay): Hu et al. 2024, section 4,
    with a linear decay. Both end at `settings.final`.
    """
    warmup = round(settings.warmup * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    if settings.name == "cosine":
        done = (step - warmup) / max(1, num_steps - 1 - warmup)
        return settings.final + (1 - settings.final) * 0.5 * (1 + math.cos(math.pi * done))
    decay = max(1, round(settings.decay * num_steps))
    left = (num_steps - 1 - step) / decay
    return settings.final + (1 - settings.final) * min(1.0, left)
