"""The shape of a model, in the words of Hugging Face's `config.json`, and the named presets."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

RopeKind = Literal["linear", "dynamic", "yarn", "llama3"]


class RopeScaling(BaseModel):
    """How positions beyond the context of training are made readable; `model/rope.py` computes it.

    The keys are those of `rope_parameters` in `config.json`. A key that is None has the default
    that transformers gives it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rope_type: RopeKind
    factor: float = Field(ge=1, le=1e6, description="New context / original context.")
    original_max_position_embeddings: int = Field(ge=1, description="Context of training.")
    # YaRN alone
    attention_factor: float | None = Field(None, gt=0)
    beta_fast: float | None = Field(None, gt=0)
    beta_slow: float | None = Field(None, gt=0)
    mscale: float | None = Field(None, ge=0)
    mscale_all_dim: float | None = Field(None, ge=0)
    truncate: bool | None = None
    # Llama 3 alone
    low_freq_factor: float | None = Field(None, gt=0)
    high_freq_factor: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _belongs_to_its_kind(self) -> "RopeScaling":
        own: dict[RopeKind, set[str]] = {
            "yarn": {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
            | {"truncate"},
            "llama3": {"low_freq_factor", "high_freq_factor"},
        }
        own_here = own.get(self.rope_type, set()) | {"rope_type", "factor"}
        own_here |= {"original_max_position_embeddings"}
        if strange := sorted(self.model_dump(exclude_none=True).keys() - own_here):
            raise ValueError(f"{strange[0]} does not belong to the rope_type {self.rope_type!r}")
        if self.rope_type == "llama3":
            low, high = self.low_freq_factor, self.high_freq_factor
            if low is None or high is None or low >= high:
                raise ValueError("llama3 needs a low_freq_factor below its high_freq_factor")
        return self


class ModelConfig(BaseModel):
    """Shape of a dense decoder: RMSNorm first, SwiGLU, RoPE, grouped-query attention, no biases."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vocab_size: int = Field(6400, ge=1)
    hidden_size: int = Field(512, ge=1)
    intermediate_size: int = Field(1408, ge=1)
    num_hidden_layers: int = Field(8, ge=1)
    num_attention_heads: int = Field(16, ge=1)
    num_key_value_heads: int = Field(8, ge=1)
    head_dim: int = Field(32, ge=2)
    max_position_embeddings: int = Field(512, ge=1, description="Longest context, in tokens.")
    rope_theta: float = Field(10_000.0, gt=0)
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = Field(1e-5, gt=0)
    qk_norm: bool = Field(False, description="RMSNorm on queries and keys (the Qwen3 layout).")
    tie_word_embeddings: bool = True

    @model_validator(mode="after")
    def _fits_together(self) -> "ModelConfig":
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: RoPE turns pairs")
        if self.rope_scaling is not None and self.rope_theta <= 1:
            raise ValueError(f"rope_theta ({self.rope_theta}) must be above 1 to be scaled")
        return self

    @property
    def architecture(self) -> Literal["LlamaForCausalLM", "Qwen3ForCausalLM"]:
        """The transformers class that runs this model as it is."""
        return "Qwen3ForCausalLM" if self.qk_norm else "LlamaForCausalLM"


# The named shapes. The vocabulary is the tokenizer's, and replaces the default of 6,400.
PRESETS: dict[str, dict[str, int | float | bool]] = {
    "nano": dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
    ),
    "demo": dict(
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
    ),
    "small": dict(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=32,
        max_position_embeddings=512,
    ),
    "base": dict(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=48,
        max_position_embeddings=512,
    ),
}
