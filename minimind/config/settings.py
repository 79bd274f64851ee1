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
    """Where the model comes from: a directory to go on with, or a preset to start from zero."""

    init: Identity[str | None] = Field(None, description="Model directory to start from.")
    context: Identity[int | None] = Field(
        None, ge=1, description="Stretch the context of `init` to this."
    )
    rope_scaling: Identity[Literal["linear", "dynamic", "yarn"] | None] = Field(
        None, description="How the context is stretched; default: yarn."
    )
    preset: Identity[str] = Field("small", description="Named shape of a new model.")
    hidden_size: Identity[int | None] = None
    intermediate_size: Identity[int | None] = None
    num_hidden_layers: Identity[int | None] = None
    num_attention_heads: Identity[int | None] = None
    num_key_value_heads: Identity[int | None] = None
    head_dim: Identity[int | None] = None
    max_position_embeddings: Identity[int | None] = None
    rope_theta: Identity[float | None] = None
    rms_norm_eps: Identity[float | None] = None
    qk_norm: Identity[bool | None] = None
    num_local_experts: Identity[int | None] = None
    num_experts_per_tok: Identity[int | None] = None
    shared_intermediate_size: Identity[int | None] = None

    @field_validator("preset")
    @classmethod
    def _known_preset(cls, preset: str) -> str:
        if preset not in PRESETS:
            raise ValueError(f"it should be one of {', '.join(PRESETS)}")
        return preset

    @model_validator(mode="after")
    def _stretches_a_model(self) -> "ModelSettings":
        if self.context and not self.init:
            raise ValueError(
                "context stretches the model that init names; "
                "the context of a new model is max_position_embeddings"
            )
        if self.rope_scaling and not self.context:
            raise ValueError("rope_scaling says how to reach a context; set context too")
        return self

    @model_validator(mode="after")
    def _has_one_shape(self) -> "ModelSettings":
        given = self.model_dump(exclude=_OF_ANY_MODEL, exclude_none=True)
        if self.preset == type(self).model_fields["preset"].default:
            del given["preset"]
        if self.init and given:
            raise ValueError(
                f"{', '.join(given)}: the model that init names has a shape of its own; "
                f"leave {'them' if len(given) > 1 else 'it'} out, or init"
            )
        return self

    def shape(self, vocab_size: int) -> ModelConfig:
        """The resolved shape of a new model with `vocab_size` words."""
        own = self.model_dump(exclude=_OF_ANY_MODEL | {"preset"}, exclude_none=True)
        return ModelConfig(**(PRESETS[self.preset] | own | {"vocab_size": vocab_size}))


class LoRASettings(_Settings):
    """Low-rank matrices that are trained while the model itself stays as it is."""

    rank: Identity[int] = Field(8, ge=1, description="Inner width of the matrices.")
    alpha: Identity[float] = Field(16.0, gt=0, description="They count alpha / rank times.")
    dropout: Identity[float] = Field(
        0.0, ge=0, lt=1, description="Share of their input that is dropped."
    )
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
    """What is read, and how it is cut into windows."""

    sources: Identity[list[Annotated[Source, BeforeValidator(_source)]]] = Field(
        default_factory=list,
        description='Data: "path", "path@weight", or {path, weight, schema}.',
    )
    validation: Identity[list[Annotated[DataFile, BeforeValidator(_data_file)]]] = Field(
        default_factory=list,
        description='Held-out data: "path" or {path, schema}; else a share of the sources.',
    )
    validation_fraction: Identity[float] = Field(0.005, ge=0, le=0.5, description="Share held out.")
    general: Identity[list[Annotated[DataFile, BeforeValidator(_data_file)]]] = Field(
        default_factory=list, description="Held out too: what is measured to see what is forgotten."
    )
    fill: Identity[dict[str, str]] = Field(
        default_factory=dict, description="What {{name}}, {{author}} and the like stand for."
    )
    window: Identity[int] = Field(512, ge=8, description="Tokens a training window.")
    max_bad_fraction: Operation[float] = Field(
        0.05, ge=0, le=1, description="More bad lines stop the run."
    )
    store: Operation[str | None] = Field(
        None, description="Folder of token stores; default: the cache."
    )


class OptimSettings(_Settings):
    """AdamW, or Muon for the matrices of the layers with AdamW for the rest."""

    name: Identity[Literal["adamw", "muon"]] = "muon"
    lr: Identity[float] = Field(1e-3, gt=0, description="Peak learning rate of AdamW.")
    muon_lr: Identity[float] = Field(0.02, gt=0, description="Peak learning rate of Muon.")
    momentum: Identity[float] = Field(0.95, ge=0, lt=1, description="Momentum of Muon.")
    beta1: Identity[float] = Field(0.9, ge=0, lt=1)
    beta2: Identity[float] = Field(0.95, ge=0, lt=1)
    eps: Identity[float] = Field(1e-8, gt=0)
    weight_decay: Identity[float] = Field(0.1, ge=0, description="On matrices only.")
    grad_clip: Identity[float] = Field(1.0, gt=0, description="Largest norm of the whole gradient.")


class ScheduleSettings(_Settings):
    """Warmup, then cosine, or stable and a linear decay at the end (WSD)."""

    name: Identity[Literal["cosine", "wsd"]] = "cosine"
    warmup: Identity[float] = Field(
        0.02, ge=0, le=1, description="Share of the steps that warm up."
    )
    decay: Identity[float | None] = Field(
        None, ge=0, le=1, description="Share of the steps that decay; WSD only, 0.2 if not set."
    )
    final: Identity[float] = Field(
        0.1, ge=0, le=1, description="Share of the peak that the step after the last would have."
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
    """How long, in what batches, and in what numbers."""

    epochs: Identity[float] = Field(
        1.0, gt=0, description="Passes over the data, unless steps is given."
    )
    steps: Identity[int | None] = Field(
        None, ge=1, description="Optimizer steps; overrides epochs."
    )
    batch: Identity[int] = Field(64, ge=1, description="Windows an optimizer step.")
    micro_batch: Operation[int | None] = Field(
        None, ge=1, description="Windows at once; None = by device."
    )
    precision: Identity[Literal["auto", "bf16", "fp16", "fp32"]] = "auto"
    activation_checkpointing: Operation[bool] = Field(
        False, description="Keep little for backward and compute it again: slower, less memory."
    )
    router_balance: Identity[float] = Field(
        0.01, ge=0, description="Weight of the loss that balances experts; dense models have none."
    )
    engine: Operation[Literal["torch", "deepspeed"]] = Field(
        "torch", description="Who takes the steps; deepspeed shares out what each process holds."
    )
    zero_stage: Operation[Literal[1, 2, 3]] = Field(
        2, description="What deepspeed shares out: moments; 2: gradients too; 3: weights too."
    )
    compile: Operation[bool] = Field(False, description="torch.compile: pays on long runs only.")
    log_every: Operation[int] = Field(10, ge=1, description="Steps between lines of metrics.jsonl.")
    trackers: Operation[list[Literal["tensorboard", "wandb", "swanlab"]]] = Field(
        default_factory=list
    )

    @model_validator(mode="after")
    def _micro_batch_divides(self) -> "TrainingSettings":
        if self.micro_batch and self.batch % self.micro_batch:
            raise ValueError(
                f"batch ({self.batch}) must be a multiple of micro_batch ({self.micro_batch})"
            )
        return self


class ValidationSettings(_Settings):
    """Bits per byte on held-out data, and a look at what the model writes."""

    every: Operation[int] = Field(
        500, ge=1, description="Steps between validations; also at the end."
    )
    windows: Identity[int] = Field(64, ge=1, description="Windows a validation reads, at most.")
    prompts: Operation[list[str]] = Field(
        default_factory=list, description="Prompts continued each time."
    )


class CheckpointSettings(_Settings):
    """How often a run is saved, and how many saves are kept."""

    every: Operation[int] = Field(
        500, ge=1, description="Steps between checkpoints; also at the end."
    )
    keep: Operation[int] = Field(2, ge=1, description="Checkpoints kept, newest first.")
    keep_best: Operation[bool] = Field(
        True, description="Save and keep the best by validation too."
    )


class DPOSettings(_Settings):
    """Direct preference optimisation, for the objective dpo alone."""

    loss: Identity[Literal["sigmoid", "ipo", "sigmoid_norm"]] = "sigmoid"
    beta: Identity[float] = Field(
        0.1, gt=0, description="How dear the start is; sigmoid_norm wants more, such as 5."
    )
    label_smoothing: Identity[float] = Field(
        0.0, ge=0, lt=0.5, description="Share of pairs taken to be the wrong way round."
    )

    @model_validator(mode="after")
    def _only_sigmoids_are_smoothed(self) -> "DPOSettings":
        if self.label_smoothing and self.loss == "ipo":
            raise ValueError("label_smoothing goes with the sigmoid losses, not with ipo")
        return self


class Recipe(_Settings):
    """A whole stage: what is trained, from what, on what, how."""

    objective: Identity[Literal["pretrain", "sft", "dpo"]]
    out: Operation[str | None] = Field(None, description="Run directory.")
    tokenizer: Identity[str | None] = Field(
        None, description="Tokenizer directory; default: the model's."
    )
    device: Operation[str] = Field("auto", description="auto, cpu, cuda, cuda:1, mps.")
    seed: Identity[int] = Field(0, ge=0, lt=1 << 63)
    model: ModelSettings = Field(default_factory=lambda: ModelSettings())
    data: DataSettings = Field(default_factory=lambda: DataSettings())
    lora: Identity[LoRASettings | None] = Field(
        None, description="Train adapters instead of the model."
    )
    optim: OptimSettings = Field(default_factory=lambda: OptimSettings())
    schedule: ScheduleSettings = Field(default_factory=lambda: ScheduleSettings())
    training: TrainingSettings = Field(default_factory=lambda: TrainingSettings())
    validation: ValidationSettings = Field(default_factory=lambda: ValidationSettings())
    checkpoint: CheckpointSettings = Field(default_factory=lambda: CheckpointSettings())
    dpo: DPOSettings = Field(default_factory=lambda: DPOSettings())
