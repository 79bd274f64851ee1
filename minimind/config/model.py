"""Model architecture settings, named as in Hugging Face's `config.json`, and presets."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# Settings of a mixture of experts; config.json of a dense model does not have them.
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
    """RoPE scaling, which extends the context beyond that of training; see `model/rope.py`.

    The keys are those of `rope_parameters` in `config.json`. None stands for the default of
    transformers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rope_type: RopeKind
    factor: float = Field(ge=1, le=1e6, description="Extended context / original context.")
    original_max_position_embeddings: int = Field(
        ge=1, le=2**53, description="Context length of training, in tokens."
    )
    # YaRN only. The bounds keep its logarithms finite, and exclude no value in use.
    attention_factor: float | None = Field(None, gt=0, le=1e6)
    beta_fast: float | None = Field(None, ge=1e-6, le=1e6)
    beta_slow: float | None = Field(None, ge=1e-6, le=1e6)
    mscale: float | None = Field(None, ge=0, le=1e6)
    mscale_all_dim: float | None = Field(None, ge=0, le=1e6)
    truncate: bool | None = None
    # Llama 3 only
    low_freq_factor: float | None = Field(None, gt=0)
    high_freq_factor: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _check_keys(self) -> "RopeScaling":
        keys_of: dict[RopeKind, set[str]] = {
            "yarn": {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
            | {"truncate"},
            "llama3": {"low_freq_factor", "high_freq_factor"},
        }
        keys = keys_of.get(self.rope_type, set())
        keys |= {"rope_type", "factor", "original_max_position_embeddings"}
        if extra := sorted(self.model_dump(exclude_none=True).keys() - keys):
            raise ValueError(f"{extra[0]} is not a setting of rope_type {self.rope_type!r}")
        if self.rope_type == "llama3":
            low, high = self.low_freq_factor, self.high_freq_factor
            if low is None or high is None or low >= high:
                raise ValueError("llama3 needs a low_freq_factor below its high_freq_factor")
        return self


class ModelConfig(BaseModel):
    """Architecture of a pre-norm decoder: RMSNorm, SwiGLU, RoPE, grouped-query attention.

    Dense, or a mixture of experts if `num_local_experts` is not 0.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    vocab_size: int = Field(6400, ge=1, description="Number of tokens in the vocabulary.")
    hidden_size: int = Field(512, ge=1, description="Width of the residual stream.")
    intermediate_size: int = Field(
        1408, ge=1, description="Width of the feed-forward layers, or of each routed expert."
    )
    num_hidden_layers: int = Field(8, ge=1, description="Number of layers.")
    num_attention_heads: int = Field(16, ge=1, description="Number of query heads per layer.")
    num_key_value_heads: int = Field(
        8,
        ge=1,
        description="Number of key/value heads per layer; must divide the number of query heads.",
    )
    head_dim: int = Field(32, ge=2, description="Width of each attention head; even.")
    max_position_embeddings: int = Field(
        512, ge=1, description="Context length of the model, in tokens."
    )
    rope_theta: float = Field(10_000.0, gt=0, description="Base of the rotary frequencies.")
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = Field(
        1e-5, gt=0, description="Epsilon of RMSNorm, added to the mean square."
    )
    qk_norm: bool = Field(
        False, description="Apply RMSNorm to queries and keys (architecture of Qwen3)."
    )
    tie_word_embeddings: bool = Field(True, description="Use the embedding as the output head.")
    num_local_experts: int = Field(
        0, ge=0, description="Number of routed experts per layer; 0 = dense model."
    )
    num_experts_per_tok: int = Field(
        2, ge=1, description="Number of routed experts that process each token."
    )
    shared_intermediate_size: int = Field(
        0, ge=0, description="Total width of the shared experts; 0 = none."
    )
    # Used by IBM's Granite. Models trained here have 1 and, for attention, 1 / sqrt(head_dim).
    embedding_multiplier: float = Field(1.0, gt=0)
    residual_multiplier: float = Field(1.0, gt=0)
    logits_scaling: float = Field(1.0, gt=0)
    attention_multiplier: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _check_combination(self) -> "ModelConfig":
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: RoPE rotates pairs")
        if self.rope_scaling is not None and self.rope_theta < 1.1:  # YaRN divides by its logarithm
            raise ValueError(
                f"rope_theta ({self.rope_theta}) must be at least 1.1 with rope_scaling"
            )
        if self.num_local_experts:
            if self.num_experts_per_tok > self.num_local_experts:
                raise ValueError(
                    f"num_experts_per_tok ({self.num_experts_per_tok}) must not exceed "
                    f"num_local_experts ({self.num_local_experts})"
                )
            if self.qk_norm:
                raise ValueError(
                    "qk_norm cannot be combined with num_local_experts: mixtures of experts are "
                    "saved as GraniteMoeSharedForCausalLM, which has no RMSNorm of queries and "
                    "keys (Qwen3MoeForCausalLM, which has it, is not supported)"
                )
        elif any(
            getattr(self, name) != type(self).model_fields[name].default for name in MOE_FIELDS
        ):
            raise ValueError("num_local_experts is 0: a dense model has no expert settings")
        return self

    @property
    def active_intermediate_size(self) -> int:
        """Total feed-forward width per layer that processes a token."""
        if not self.num_local_experts:
            return self.intermediate_size
        return self.num_experts_per_tok * self.intermediate_size + self.shared_intermediate_size

    @property
    def architecture(
        self,
    ) -> Literal["LlamaForCausalLM", "Qwen3ForCausalLM", "GraniteMoeSharedForCausalLM"]:
        """Class of transformers that runs this model."""
        if self.num_local_experts:
            return "GraniteMoeSharedForCausalLM"
        return "Qwen3ForCausalLM" if self.qk_norm else "LlamaForCausalLM"


# `vocab_size` is that of the tokenizer.
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
    "nano-moe": dict(  # as many active parameters as nano
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
    "demo-moe": dict(  # as many active parameters as demo
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
    "moe": dict(  # width for two shared experts; four routed ones, two of them active
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
