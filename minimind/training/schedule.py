"""Learning-rate schedule over a run, as a fraction of the peak."""

import math

from minimind.config.settings import ScheduleSettings


def lr_fraction(step: int, num_steps: int, settings: ScheduleSettings) -> float:
    """Return the fraction of the peak at `step`, 0-based: linear warmup, then cosine or WSD.

    Cosine: Loshchilov and Hutter 2017. WSD (warmup, stable, decay): Hu et al. 2024, section 4,
    with a linear decay. Both fall towards `settings.final`, which a step after the last one would
    have: no step has a learning rate of 0, however short the run is.
    """
    warmup = round(settings.warmup * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    if settings.name == "cosine":
        progress = (step - warmup) / (num_steps - warmup)
        return settings.final + (1 - settings.final) * 0.5 * (1 + math.cos(math.pi * progress))
    assert settings.decay is not None, "a WSD schedule has a decay"
    # Both shares may be rounded up: warmup comes first.
    decay = max(1, min(round(settings.decay * num_steps), num_steps - warmup))
    return settings.final + (1 - settings.final) * min(1.0, (num_steps - step) / decay)
