"""The shape of a model, in the words of Hugging Face's `config.json`, and the named presets."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


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
