"""Every setting of a run: one small class a concern, put together by `Recipe`.

Each setting is marked beside its declaration: `Identity` if it decides what the run computes, and
must be the same when the run is resumed; `Operation` if it only decides how, and may change.
"""

import os
from enum import Enum
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from minimind.config.model import PRESETS, ModelConfig


class Role(Enum):
    """The part that a setting plays when a run is resumed."""

    IDENTITY = "identity"
    OPERATION = "operation"


_T = TypeVar("_T")
Identity = Annotated[_T, Role.IDENTITY]
Operation = Annotated[_T, Role.OPERATION]

SCHEMAS = Literal[
    "auto",
    "text",
    "conversations",
    "messages",
    "sharegpt",
    "alpaca",
    "qa",
    "prompt_completion",
    "pairs",
]


class _Settings(BaseModel):
    # Strict: "64" is no number and `true` no 1; what a recipe says is what the run does.
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, serialize_by_alias=True
    )


_OF_ANY_MODEL = {"init", "context", "rope_scaling"}  # what is no part of a new model's shape


class ModelSettings(_Settings):
    """The model: a directory to start from, or the shape of a new one."""

    init: Identity[str | None] = Field(
        None, description="Model or run directory to start from; default: a new model."
    )
    context: Identity[int | None] = Field(
        None, ge=1, description="Extended context length of `init`, in tokens (RoPE scaling)."
    )
    rope_scaling: Identity[Literal["linear", "dynamic", "yarn"] | None] = Field(
        None, description="RoPE scaling method for `context`; default: yarn."
    )
    preset: Identity[str] = Field("small", description="Named shape of a new model.")
    hidden_size: Identity[int | None] = Field(None, description="Width of the residual stream.")
    intermediate_size: Identity[int | None] = Field(
        None, description="Inner width of the feed-forward layers, or of one expert."
    )
    num_hidden_layers: Identity[int | None] = Field(None, description="Number of layers.")
    num_attention_heads: Identity[int | None] = Field(None, description="Number of query heads.")
    num_key_value_heads: Identity[int | None] = Field(
        None, description="Number of key and value heads."
    )
    head_dim: Identity[int | None] = Field(None, description="Width of one head.")
    max_position_embeddings: Identity[int | None] = Field(
        None, description="Context length of a new model, in tokens."
    )
    rope_theta: Identity[float | None] = Field(None, description="Base of the rotary frequencies.")
    rms_norm_eps: Identity[float | None] = Field(None, description="Epsilon of RMSNorm.")
    qk_norm: Identity[bool | None] = Field(None, description="RMSNorm on queries and keys.")
    num_local_experts: Identity[int | None] = Field(
        None, description="Number of routed experts; 0 = dense."
    )
    num_experts_per_tok: Identity[int | None] = Field(None, description="Routed experts per token.")
    shared_intermediate_size: Identity[int | None] = Field(
        None, description="Inner width of the shared experts together."
    )

    @field_validator("preset")
    @classmethod
    def _known_preset(cls, preset: str) -> str:
        if preset not in PRESETS:
            raise ValueError(f"it should be one of {', '.join(PRESETS)}")
        return preset

    @model_validator(mode="after")
    def _extends_a_model(self) -> "ModelSettings":
        if self.context and not self.init:
            raise ValueError(
                "context extends the model that init names; "
                "the context length of a new model is max_position_embeddings"
            )
        if self.rope_scaling and not self.context:
            raise ValueError("rope_scaling has no effect without context; set context too")
        return self

    @model_validator(mode="after")
    def _has_one_shape(self) -> "ModelSettings":
        given = self.model_dump(exclude=_OF_ANY_MODEL, exclude_none=True)
        if self.preset == type(self).model_fields["preset"].default:
            del given["preset"]
        if self.init and given:
            raise ValueError(
                f"{', '.join(given)}: the model that init names already has a shape; "
                f"leave {'them' if len(given) > 1 else 'it'} out, or init"
            )
        return self

    def shape(self, vocab_size: int) -> ModelConfig:
        """The resolved shape of a new model with a vocabulary of `vocab_size` tokens."""
        own = self.model_dump(exclude=_OF_ANY_MODEL | {"preset"}, exclude_none=True)
        return ModelConfig(**(PRESETS[self.preset] | own | {"vocab_size": vocab_size}))


class LoRASettings(_Settings):
    """A LoRA adapter (Hu et al. 2021)."""

    rank: Identity[int] = Field(8, ge=1, description="Rank of the low-rank matrices.")
    alpha: Identity[float] = Field(
        16.0, gt=0, description="Scale: the update is multiplied by alpha / rank."
    )
    dropout: Identity[float] = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    targets: Identity[list[str]] = Field(
        default_factory=lambda: ["all"],
        min_length=1,
        description="Modules by name (q_proj) or group: attention, mlp, all.",
    )


class DataFile(_Settings):
    """Data by path (a file, folder or glob), and the schema of its records."""

    path: str
    record_schema: SCHEMAS = Field("auto", alias="schema")  # pydantic models have a `schema`


class Source(DataFile):
    """One part of the training data, and how many times an epoch sees it."""

    weight: float = Field(1.0, gt=0, description="3 = seen three times an epoch, 0.5 = half.")


def _data_file(value: object) -> object:
    """Accept `"path"` where a table is meant."""
    return {"path": value} if isinstance(value, str) else value


def _source(value: object) -> object:
    """Accept `"path"` and `"path@weight"` where a table is meant; a path that exists is a path."""
    if not isinstance(value, str) or os.path.exists(os.path.expanduser(value)):
        return _data_file(value)
    path, at, weight = value.rpartition("@")
    if at:
        try:
            return {"path": path, "weight": float(weight)}
        except ValueError:
            pass  # an "@" that belongs to the path
    return {"path": value}


class DataSettings(_Settings):
    """Training data and the sequences made of it."""

    sources: Identity[list[Annotated[Source, BeforeValidator(_source)]]] = Field(
        default_factory=list,
        description='Training data: "path", "path@weight", or {path, weight, schema}.',
    )
    validation: Identity[list[Annotated[DataFile, BeforeValidator(_data_file)]]] = Field(
        default_factory=list,
        description='Held-out data: "path" or {path, schema}; default: a share of the sources.',
    )
    validation_fraction: Identity[float] = Field(
        0.005, ge=0, le=0.5, description="Share of the sources that is held out."
    )
    retention: Identity[list[Annotated[DataFile, BeforeValidator(_data_file)]]] = Field(
        default_factory=list, description="Held-out data of another kind, to measure forgetting."
    )
    variables: Identity[dict[str, str]] = Field(
        default_factory=dict,
        description="Values of template variables such as {{name}} in the data.",
    )
    seq_len: Identity[int] = Field(512, ge=8, description="Sequence length in tokens.")
    max_invalid_fraction: Operation[float] = Field(
        0.05, ge=0, le=1, description="Stop when a larger share of the records is invalid."
    )
    store: Operation[str | None] = Field(
        None, description="Folder of the token stores; default: the cache folder."
    )


class OptimSettings(_Settings):
    """Optimizer."""

    name: Identity[Literal["adamw", "muon"]] = Field(
        "muon", description="adamw, or muon for hidden matrices with AdamW for the rest."
    )
    lr: Identity[float] = Field(1e-3, gt=0, description="Peak learning rate of AdamW.")
    muon_lr: Identity[float] = Field(0.02, gt=0, description="Peak learning rate of Muon.")
    momentum: Identity[float] = Field(0.95, ge=0, lt=1, description="Momentum of Muon.")
    beta1: Identity[float] = Field(0.9, ge=0, lt=1, description="First-moment decay of AdamW.")
    beta2: Identity[float] = Field(0.95, ge=0, lt=1, description="Second-moment decay of AdamW.")
    eps: Identity[float] = Field(1e-8, gt=0, description="Epsilon of AdamW.")
    weight_decay: Identity[float] = Field(
        0.1, ge=0, description="Decoupled weight decay, on matrices only."
    )
    grad_clip: Identity[float] = Field(1.0, gt=0, description="Maximum norm of the whole gradient.")


class ScheduleSettings(_Settings):
    """Learning-rate schedule: warmup, then cosine, or stable and linear decay (WSD)."""

    name: Identity[Literal["cosine", "wsd"]] = Field(
        "cosine", description="cosine, or wsd (warmup, stable, linear decay)."
    )
    warmup: Identity[float] = Field(
        0.02, ge=0, le=1, description="Fraction of the steps that warm up."
    )
    decay: Identity[float | None] = Field(
        None, ge=0, le=1, description="Fraction of the steps that decay; wsd only, default 0.2."
    )
    final: Identity[float] = Field(
        0.1,
        ge=0,
        le=1,
        description="Learning rate that the schedule decays to, as a fraction of the peak.",
    )

    @model_validator(mode="before")
    @classmethod
    def _wsd_decays(cls, values: Any) -> Any:
        is_wsd = isinstance(values, dict) and values.get("name") == "wsd"
        return values | {"decay": 0.2} if is_wsd and values.get("decay") is None else values

    @model_validator(mode="after")
    def _phases_fit(self) -> "ScheduleSettings":
        if self.name == "cosine" and self.decay is not None:
            raise ValueError(
                f"decay ({self.decay}) belongs to WSD, and the schedule is cosine; "
                'leave decay out, or set name = "wsd"'
            )
        if self.decay is not None and self.warmup + self.decay > 1:
            raise ValueError(
                f"warmup ({self.warmup}) and decay ({self.decay}) are shares of the same steps "
                "and add up to more than 1; lower one of them"
            )
        return self


class TrainingSettings(_Settings):
    """Length of the run, batch sizes, precision, backend."""

    epochs: Identity[float] = Field(
        1.0, gt=0, description="Passes over the data, unless steps is set."
    )
    steps: Identity[int | None] = Field(
        None, ge=1, description="Optimizer steps; overrides epochs."
    )
    global_batch_size: Identity[int] = Field(
        64, ge=1, description="Sequences per optimizer step, over all processes."
    )
    micro_batch_size: Operation[int | None] = Field(
        None, ge=1, description="Sequences per forward pass on one device; default: what fits."
    )
    precision: Identity[Literal["auto", "bf16", "fp16", "fp32"]] = Field(
        "auto", description="Autocast dtype; auto: bf16 where the device multiplies it."
    )
    activation_checkpointing: Operation[bool] = Field(
        False, description="Recompute activations in the backward pass: less memory, slower."
    )
    router_aux_loss_coef: Identity[float] = Field(
        0.01, ge=0, description="Weight of the load-balancing loss of a mixture of experts."
    )
    backend: Operation[Literal["torch", "deepspeed"]] = Field(
        "torch", description="torch, or deepspeed (ZeRO)."
    )
    zero_stage: Operation[Literal[1, 2, 3]] = Field(
        2, description="ZeRO stage: 1 shards optimizer state, 2 also gradients, 3 also weights."
    )
    compile: Operation[bool] = Field(False, description="Use torch.compile; pays off in long runs.")
    log_every: Operation[int] = Field(10, ge=1, description="Steps per line of metrics.jsonl.")
    trackers: Operation[list[Literal["tensorboard", "wandb", "swanlab"]]] = Field(
        default_factory=list, description="Experiment trackers: tensorboard, wandb, swanlab."
    )

    @model_validator(mode="after")
    def _micro_batch_divides(self) -> "TrainingSettings":
        if self.micro_batch_size and self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size ({self.global_batch_size}) must be a multiple of "
                f"micro_batch_size ({self.micro_batch_size})"
            )
        return self


class ValidationSettings(_Settings):
    """Validation on held-out data, and samples."""

    every: Operation[int] = Field(
        500, ge=1, description="Steps between validations; one more at the end."
    )
    num_sequences: Identity[int] = Field(
        64, ge=1, description="Maximum number of sequences per validation."
    )
    prompts: Operation[list[str]] = Field(
        default_factory=list, description="Prompts that are continued at each validation."
    )


class CheckpointSettings(_Settings):
    """Checkpoints."""

    every: Operation[int] = Field(
        500, ge=1, description="Steps between checkpoints; one more at the end."
    )
    keep: Operation[int] = Field(2, ge=1, description="Number of newest checkpoints to keep.")
    keep_best: Operation[bool] = Field(
        True, description="Also keep the best checkpoint by validation."
    )


class DPOSettings(_Settings):
    """Direct preference optimization; used by the objective dpo only."""

    loss: Identity[Literal["sigmoid", "ipo", "sigmoid_norm"]] = Field(
        "sigmoid", description="sigmoid (DPO), ipo, or sigmoid_norm (length-normalized)."
    )
    beta: Identity[float] = Field(
        0.1, gt=0, description="Strength of the KL penalty; about 5 with sigmoid_norm."
    )
    label_smoothing: Identity[float] = Field(
        0.0, ge=0, lt=0.5, description="Probability that a preference label is flipped (cDPO)."
    )

    @model_validator(mode="after")
    def _only_sigmoids_are_smoothed(self) -> "DPOSettings":
        if self.label_smoothing and self.loss == "ipo":
            raise ValueError("label_smoothing goes with the sigmoid losses, not with ipo")
        return self


class Recipe(_Settings):
    """All settings of one training stage."""

    objective: Identity[Literal["pretrain", "sft", "dpo"]] = Field(
        ..., description="What the stage trains for."
    )
    out: Operation[str | None] = Field(None, description="Run directory.")
    tokenizer: Identity[str | None] = Field(
        None, description="Tokenizer directory; default: that of model.init."
    )
    device: Operation[str] = Field("auto", description="auto, cpu, cuda, cuda:1 or mps.")
    seed: Identity[int] = Field(
        0, ge=0, lt=1 << 63, description="Seed of initialization, data order and dropout."
    )
    model: ModelSettings = Field(default_factory=lambda: ModelSettings())
    data: DataSettings = Field(default_factory=lambda: DataSettings())
    lora: Identity[LoRASettings | None] = Field(
        None, description="Train a LoRA adapter instead of the whole model."
    )
    optim: OptimSettings = Field(default_factory=lambda: OptimSettings())
    schedule: ScheduleSettings = Field(default_factory=lambda: ScheduleSettings())
    training: TrainingSettings = Field(default_factory=lambda: TrainingSettings())
    validation: ValidationSettings = Field(default_factory=lambda: ValidationSettings())
    checkpoint: CheckpointSettings = Field(default_factory=lambda: CheckpointSettings())
    dpo: DPOSettings = Field(default_factory=lambda: DPOSettings())
