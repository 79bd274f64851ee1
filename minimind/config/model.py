"""The shape of a model, in the words of Hugging Face's `config.json`, and the named presets."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# What only a mixture of experts has; other models' config.json leaves it out.
MOE_FIELDS = (
    "num_local_experts",
    "num_experts_per_tok",
    "shared_intermediate_size",
    "embedding_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "attention_multiplier",
)

RopeKind = Literal["linear", "dynamic", "yarn", "llama3"]


class RopeScaling(BaseModel):
    """How positions beyond the context of training are made readable; `model/rope.py` computes it.

    The keys are those of `rope_parameters` in `config.json`. A key that is None has the default
    that transformers gives it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rope_type: RopeKind
    factor: float = Field(ge=1, le=1e6, description="New context / original context.")
    original_max_position_embeddings: int = Field(
        ge=1, le=2**53, description="Context of training."
    )
    # YaRN alone; the bounds are far from any that is in use, and keep its logarithms finite
    attention_factor: float | None = Field(None, gt=0, le=1e6)
    beta_fast: float | None = Field(None, ge=1e-6, le=1e6)
    beta_slow: float | None = Field(None, ge=1e-6, le=1e6)
    mscale: float | None = Field(None, ge=0, le=1e6)
    mscale_all_dim: float | None = Field(None, ge=0, le=1e6)
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
    """Shape of a decoder: RMSNorm first, SwiGLU, RoPE, grouped-query attention, no biases.

    Dense, or a mixture of experts; `intermediate_size` is then the width of one routed expert.
    """

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
    num_local_experts: int = Field(0, ge=0, description="Routed experts a layer; 0 = dense.")
    num_experts_per_tok: int = Field(2, ge=1, description="Routed experts that a token uses.")
    shared_intermediate_size: int = Field(0, ge=0, description="Width of all shared experts.")
    # Of Granite models made elsewhere; ours have 1, and 1 / sqrt(head_dim) for attention.
    embedding_multiplier: float = Field(1.0, gt=0)
    residual_multiplier: float = Field(1.0, gt=0)
    logits_scaling: float = Field(1.0, gt=0)
    attention_multiplier: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _fits_together(self) -> "ModelConfig":
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: RoPE turns pairs")
        if self.rope_scaling is not None and self.rope_theta < 1.1:  # its logarithm divides
            raise ValueError(f"rope_theta ({self.rope_theta}) must be 1.1 or more to be scaled")
        if self.num_local_experts:
            if self.num_experts_per_tok > self.num_local_experts:
                raise ValueError(
                    f"num_experts_per_tok ({self.num_experts_per_tok}) must not be more than "
                    f"num_local_experts ({self.num_local_experts})"
                )
            if self.qk_norm:
                raise ValueError("qk_norm does not go with num_local_experts: no class has both")
        elif set(MOE_FIELDS) & self._given():
            raise ValueError("num_local_experts is 0: a dense model has no settings of experts")
        return self

    def _given(self) -> set[str]:
        """Fields that are not as they are by default."""
        fields = type(self).model_fields.items()
        return {name for name, field in fields if getattr(self, name) != field.default}

    @property
    def active_intermediate_size(self) -> int:
        """Width of all feed-forward that a token passes through in a layer."""
        if not self.num_local_experts:
            return self.intermediate_size
        return self.num_experts_per_tok * self.intermediate_size + self.shared_intermediate_size

    @property
    def architecture(
        self,
    ) -> Literal["LlamaForCausalLM", "Qwen3ForCausalLM", "GraniteMoeSharedForCausalLM"]:
        """The transformers class that runs this model as it is."""
        if self.num_local_experts:
            return "GraniteMoeSharedForCausalLM"
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
    "nano-moe": dict(  # as many parameters at work as in nano
        hidden_size=32,
        intermediate_size=16,
        shared_intermediate_size=32,
        num_local_experts=4,
        num_experts_per_tok=2,
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
    "demo-moe": dict(  # as many parameters at work as in demo
        hidden_size=256,
        intermediate_size=176,
        shared_intermediate_size=352,
        num_local_experts=4,
        num_experts_per_tok=2,
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
    "moe": dict(  # two shared experts, side by side, and four routed ones
        hidden_size=512,
        intermediate_size=1408,
        shared_intermediate_size=2816,
        num_local_experts=4,
        num_experts_per_tok=2,
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
