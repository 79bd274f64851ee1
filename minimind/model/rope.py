"""Rotary position embedding (Su et al. 2021, RoFormer), in Hugging Face's "rotate half" layout.

A pair of numbers turns by position x frequency. Positions beyond those of training turn the slow
pairs by angles that the model has never seen; scaling changes the frequencies so that they stay
within what it has:

    linear   all frequencies / factor: Chen et al. 2023, "Position Interpolation"
    dynamic  a larger base, the more so the longer the text: NTK-aware scaling (bloc97 2023),
             made dynamic by emozilla 2023; a text within the original context is read as ever
    yarn     fast pairs as they are, slow ones / factor, a ramp between, and sharper attention:
             Peng et al. 2023, "YaRN"
    llama3   the same idea with wavelengths as its limits: Llama 3.1, as in transformers
"""

import math

import torch
from pydantic import ValidationError
from torch import Tensor

from minimind.config.model import ModelConfig, RopeKind, RopeScaling
from minimind.errors import ModelError

BEST_SCALING: RopeKind = "yarn"  # benchmarks/records/long-context.md has the figures


def extend_context(config: ModelConfig, context: int, kind: RopeKind | None = None) -> ModelConfig:
    """The same model, made to read `context` tokens by scaling of this kind.

    A context within the model's own needs no scaling. Raises ModelError for one that is out of
    reach, and for a model whose context is stretched already.
    """
    original = config.max_position_embeddings
    if context <= original:
        return config
    if config.rope_scaling is not None:
        raise ModelError(
            f"the model's context of {original:,} tokens is stretched already, by "
            f"{config.rope_scaling.rope_type}, and cannot be stretched to {context:,}; "
            f"give a context of at most {original}"
        )
    try:
        scaling = RopeScaling(
            rope_type=kind or BEST_SCALING,
            factor=context / original,
            original_max_position_embeddings=original,
        )
        changed = {"max_position_embeddings": context, "rope_scaling": scaling}
        return ModelConfig.model_validate(config.model_dump() | changed)
    except ValidationError as error:
        what = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ModelError(
            f"the model's context cannot be stretched from {original:,} tokens to {context:,}: "
            f"{what}"
        ) from None


def rope_table(config: ModelConfig, positions: Tensor, length: int | Tensor) -> Tensor:
    """Cosines and sines of the angles at `positions` [...] of a text of `length` tokens so far.

    length: one number, or [...] where each position is in a text of its own length.
    [2, ..., head_dim], float32, on the device of `positions`.
    """
    frequencies, factor = rope_frequencies(config, length)
    angles = positions.float()[..., None] * frequencies.to(positions.device)
    angles = torch.cat((angles, angles), dim=-1)
    return torch.stack((angles.cos(), angles.sin())) * factor


def depends_on_length(config: ModelConfig, length: int) -> bool:
    """Whether a text of `length` tokens has frequencies of its own."""
    scaling = config.rope_scaling
    return (
        scaling is not None
        and scaling.rope_type == "dynamic"
        and length > scaling.original_max_position_embeddings
    )


def rope_frequencies(config: ModelConfig, length: int | Tensor) -> tuple[Tensor, float]:
    """([head_dim / 2] angle a position, factor of cosines and sines), for `length` tokens so far.

    In float32, step by step as transformers computes them, on the CPU; for lengths [...] that
    dynamic scaling tells apart [..., head_dim / 2], where the lengths are.
    """
    base, scaling = config.rope_theta, config.rope_scaling
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    if scaling is None:
        return 1.0 / (base**exponents), 1.0
    match scaling.rope_type:
        case "linear":
            return 1.0 / (base**exponents) / scaling.factor, 1.0
        case "dynamic":
            stretched = _dynamic_base(base, config.head_dim, scaling, length)
            if isinstance(stretched, Tensor):
                stretched, exponents = stretched[..., None], exponents.to(stretched.device)
            return 1.0 / (stretched**exponents), 1.0
        case "yarn":
            return _yarn(base, exponents, scaling), _yarn_attention_factor(scaling)
        case "llama3":
            return _llama3(1.0 / (base**exponents), scaling), 1.0


def _dynamic_base(
    base: float, head_dim: int, scaling: RopeScaling, length: int | Tensor
) -> float | Tensor:
    """The base under which the slowest pair turns, over the whole text, as far as in training."""
    original, factor = scaling.original_max_position_embeddings, scaling.factor
    if head_dim == 2:
        return base  # the only pair turns once a position at any base
    longest = length.clamp(min=original) if isinstance(length, Tensor) else max(length, original)
    stretch = factor * longest / original - (factor - 1)
    return base * stretch ** (head_dim / (head_dim - 2))


def _yarn(base: float, exponents: Tensor, scaling: RopeScaling) -> Tensor:
    """Section 3.2 of the paper, "NTK-by-parts"; the ramp runs over pairs, not over rotations."""
    pairs = len(exponents)
    original = scaling.original_max_position_embeddings

    def pair_that_turns(rotations: float) -> float:
        """The pair, as a fraction, that makes so many full turns over the original context."""
        return pairs * math.log(original / (rotations * 2 * math.pi)) / math.log(base)

    low, high = (
        pair_that_turns(scaling.beta_fast or 32),
        pair_that_turns(scaling.beta_slow or 1),
    )
    if scaling.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(pairs, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    turns = base**exponents
    return 1.0 / (scaling.factor * turns) * (1 - kept) + 1.0 / turns * kept


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    """Section 3.3 of the paper: attention is sharper by the square of this."""

    def sharpness(weight: float) -> float:
        return 0.1 * weight * math.log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return sharpness(scaling.mscale) / sharpness(scaling.mscale_all_dim)
    return sharpness(1.0)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Pairs that turn often over the original context stay; those that turn seldom are slowed."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    assert low is not None and high is not None, "the configuration is validated"
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def rotate(x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + head_dim/2) by its position's angle; cos, sin: [B or 1, T, 1, D]."""
    first, second = x_BTHD.chunk(2, dim=-1)
    return x_BTHD * cos + torch.cat((-second, first), dim=-1) * sin
