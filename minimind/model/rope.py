"""Rotary position embedding (Su et al. 2021, RoFormer), in Hugging Face's "rotate half" layout.

Each pair of dimensions (i, i + D/2) is rotated by the angle position x frequency. Positions beyond
the training context rotate the low-frequency pairs by angles that the model has never seen. RoPE
scaling lowers the frequencies so that the angles stay within the range seen in training:

    linear   all frequencies / factor: Chen et al. 2023, "Position Interpolation"
    dynamic  a base that grows with the sequence length: NTK-aware scaling (bloc97 2023), made
             dynamic by emozilla 2023; sequences within the original context are unaffected
    yarn     high frequencies unchanged, low ones / factor, a ramp in between, and attention
             scaled up: Peng et al. 2023, "YaRN"
    llama3   the same idea with limits given as wavelengths: Llama 3.1, as in transformers

Shapes: B sequences, T tokens, H heads, D head_dim; D/2 frequencies, one per pair of dimensions.
"""

import math

import torch
from pydantic import ValidationError
from torch import Tensor

from minimind.config.model import ModelConfig, RopeKind, RopeScaling
from minimind.errors import ModelError

BEST_SCALING: RopeKind = "yarn"  # measured: benchmarks/records/long-context.md


# --8<-- [start:rotary]
def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (i, i + D/2) of x [B, T, H, D] by the angle of its position.

    cos, sin: [B or 1, T, 1, D], or [T, 1, D].
    """
    first, second = x.chunk(2, dim=-1)  # [B, T, H, D/2] each
    return x * cos + torch.cat((-second, first), dim=-1) * sin


# --8<-- [end:rotary]


def rope_table(config: ModelConfig, positions: Tensor, length: int | Tensor) -> Tensor:
    """Return the cosines and sines of the angles at `positions` [...], as [2, ..., D] float32.

    length: tokens of the sequence so far, one number or [...], one per position.
    """
    # --8<-- [start:table]
    frequencies, factor = rope_frequencies(config, length)
    angles = positions.float()[..., None] * frequencies.to(positions.device)  # [..., D/2]
    angles = torch.cat((angles, angles), dim=-1)  # [..., D]
    return torch.stack((angles.cos(), angles.sin())) * factor
    # --8<-- [end:table]


def depends_on_length(config: ModelConfig, length: int) -> bool:
    """Return True if a sequence of `length` tokens has frequencies that depend on its length."""
    scaling = config.rope_scaling
    return (
        scaling is not None
        and scaling.rope_type == "dynamic"
        and length > scaling.original_max_position_embeddings
    )


def rope_frequencies(config: ModelConfig, length: int | Tensor) -> tuple[Tensor, float]:
    """Return ([D/2] frequencies in radians per position, factor on cosines and sines).

    Computed in float32 on the CPU, in the order of operations of transformers. Under dynamic
    scaling, `length` may be a tensor [...]; the frequencies are then [..., D/2], on its device.
    """
    base, scaling = config.rope_theta, config.rope_scaling
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    if scaling is None:
        return 1.0 / (base**exponents), 1.0
    # --8<-- [start:scaling]
    match scaling.rope_type:
        case "linear":
            return 1.0 / (base**exponents) / scaling.factor, 1.0
        case "dynamic":
            larger_base = _dynamic_base(base, config.head_dim, scaling, length)
            if isinstance(larger_base, Tensor):
                larger_base, exponents = larger_base[..., None], exponents.to(larger_base.device)
            return 1.0 / (larger_base**exponents), 1.0
        case "yarn":
            return _yarn(base, exponents, scaling), _yarn_attention_factor(scaling)
        case "llama3":
            return _llama3(1.0 / (base**exponents), scaling), 1.0
    # --8<-- [end:scaling]


def _dynamic_base(
    base: float, head_dim: int, scaling: RopeScaling, length: int | Tensor
) -> float | Tensor:
    """Return the base at which the lowest frequency covers the same angles as in training."""
    original, factor = scaling.original_max_position_embeddings, scaling.factor
    if head_dim == 2:
        return base  # the only frequency is base^0 = 1
    # --8<-- [start:ntk]
    longest = length.clamp(min=original) if isinstance(length, Tensor) else max(length, original)
    ratio = factor * longest / original - (factor - 1)
    return base * ratio ** (head_dim / (head_dim - 2))
    # --8<-- [end:ntk]


def _yarn(base: float, exponents: Tensor, scaling: RopeScaling) -> Tensor:
    """Return the frequencies [D/2] of "NTK-by-parts" (section 3.2 of the YaRN paper).

    As in transformers, the ramp is linear in the index of the pair, not in rotations.
    """
    num_pairs = len(exponents)
    original = scaling.original_max_position_embeddings

    # --8<-- [start:yarn]
    def pair_index(rotations: float) -> float:
        """Return the fractional index of the pair with this many rotations per original context."""
        return num_pairs * math.log(original / (rotations * 2 * math.pi)) / math.log(base)

    low, high = pair_index(scaling.beta_fast or 32), pair_index(scaling.beta_slow or 1)
    if scaling.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * num_pairs - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(num_pairs, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    unscaled_share = 1 - ramp
    periods = base**exponents
    return 1.0 / (scaling.factor * periods) * (1 - unscaled_share) + 1.0 / periods * unscaled_share
    # --8<-- [end:yarn]


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    """Return the factor on cosines and sines; scores scale by its square (YaRN, section 3.3)."""

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return mscale(scaling.mscale) / mscale(scaling.mscale_all_dim)
    return mscale(1.0)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Keep high frequencies, divide low ones by the factor, interpolate in between."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    assert low is not None and high is not None, "the configuration is validated"
    rotations = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    unscaled_share = ((rotations - low) / (high - low)).clamp(0, 1)
    return (1 - unscaled_share) * frequencies / scaling.factor + unscaled_share * frequencies


def extend_context(config: ModelConfig, context: int, kind: RopeKind | None = None) -> ModelConfig:
    """Return the configuration of the same model with its context extended by RoPE scaling.

    Returns `config` itself if `context` is not larger than the model's own. Raises ModelError when
    the context has been extended before, and when `context` is out of range.
    """
    original = config.max_position_embeddings
    if context <= original:
        return config
    if config.rope_scaling is not None:
        raise ModelError(
            f"the model's context of {original:,} tokens was already extended by "
            f"{config.rope_scaling.rope_type} scaling and cannot be extended to {context:,}; "
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
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ModelError(
            f"the model's context cannot be extended from {original:,} tokens to {context:,}: "
            f"{reason}"
        ) from None
