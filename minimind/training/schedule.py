"""Learning-rate schedules: linear warmup, then cosine decay or WSD."""

import math

from minimind.config.settings import ScheduleSettings


def lr_fraction(step: int, num_steps: int, settings: ScheduleSettings) -> float:
    """Return the learning rate of `step`, counted from 0, as a fraction of its peak.

    cosine: Loshchilov and Hutter 2017. wsd (warmup, stable, decay): Hu et al. 2024, section 4,
    with a linear decay. Both reach `settings.final` one step after the last one, so that no step
    has a learning rate of 0, however short the run is.
    """
    # --8<-- [start:schedule]
    warmup = round(settings.warmup * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    if settings.name == "cosine":
        progress = (step - warmup) / (num_steps - warmup)
        return settings.final + (1 - settings.final) * 0.5 * (1 + math.cos(math.pi * progress))
    assert settings.decay is not None, "wsd has a decay"
    # Both numbers of steps may have been rounded up; the warmup takes precedence.
    decay = max(1, min(round(settings.decay * num_steps), num_steps - warmup))
    return settings.final + (1 - settings.final) * min(1.0, (num_steps - step) / decay)
    # --8<-- [end:schedule]
