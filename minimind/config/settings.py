"""All settings of a training run, in one class per concern; `Recipe` combines them."""

import os
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from minimind.config.model import PRESETS, ModelConfig
from minimind.config.roles import Identity, Operation, Settings
from minimind.paths import expand_user

SchemaName = Literal[
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


def _with_home(path: str | None) -> str | None:
    return str(expand_user(path)) if path and path.startswith("~") else path


_NOT_ARCHITECTURE = {"init", "context", "rope_scaling"}


def _architecture_setting(name: str) -> Any:
    """Return an optional setting with the bounds and description of the `ModelConfig` field."""
    field = ModelConfig.model_fields[name]
    bounds = {
        bound: getattr(constraint, bound)
        for constraint in field.metadata
        for bound in ("ge", "gt", "le", "lt")
        if hasattr(constraint, bound)
    }
    return Field(None, description=field.description, **bounds)


class ModelSettings(Settings):
    """The model: an existing one to start from, or the architecture of a new one.

    The architecture settings have the names of `ModelConfig` fields; None stands for the value of
    the preset. A test in `tests/config/test_settings.py` compares the two classes.
    """

    init: Identity[str | None] = Field(
        None, description="Model or run directory to start from; default: a new model."
    )
    context: Identity[int | None] = Field(
        None,
        ge=1,
        description="Context length in tokens to which RoPE scaling extends `init`; "
        "default: that of `init`.",
    )
    rope_scaling: Identity[Literal["linear", "dynamic", "yarn"] | None] = Field(
        None, description="RoPE scaling method that extends the context; default: yarn."
    )
    preset: Identity[str] = Field(
        "small",
        description=f"Architecture of a new model: {', '.join(PRESETS)}; "
        "the settings below override its values.",
    )
    hidden_size: Identity[int | None] = _architecture_setting("hidden_size")
    intermediate_size: Identity[int | None] = _architecture_setting("intermediate_size")
    num_hidden_layers: Identity[int | None] = _architecture_setting("num_hidden_layers")
    num_attention_heads: Identity[int | None] = _architecture_setting("num_attention_heads")
    num_key_value_heads: Identity[int | None] = _architecture_setting("num_key_value_heads")
    head_dim: Identity[int | None] = _architecture_setting("head_dim")
    max_position_embeddings: Identity[int | None] = _architecture_setting("max_position_embeddings")
    rope_theta: Identity[float | None] = _architecture_setting("rope_theta")
    rms_norm_eps: Identity[float | None] = _architecture_setting("rms_norm_eps")
    qk_norm: Identity[bool | None] = _architecture_setting("qk_norm")
    num_local_experts: Identity[int | None] = _architecture_setting("num_local_experts")
    num_experts_per_tok: Identity[int | None] = _architecture_setting("num_experts_per_tok")
    shared_intermediate_size: Identity[int | None] = _architecture_setting(
        "shared_intermediate_size"
    )

    _expand_home = field_validator("init")(_with_home)

    @field_validator("preset")
    @classmethod
    def _check_preset(cls, preset: str) -> str:
        if preset not in PRESETS:
            raise ValueError(f"must be one of {', '.join(PRESETS)}")
        return preset

    @model_validator(mode="after")
    def _check_context(self) -> "ModelSettings":
        if self.context and not self.init:
            raise ValueError(
                "context extends an existing model, and init is not set; "
                "for a new model set max_position_embeddings"
            )
        if self.rope_scaling and not self.context:
            raise ValueError("rope_scaling has no effect without context; set context too")
        return self

    @model_validator(mode="after")
    def _check_architecture(self) -> "ModelSettings":
        changed = self.model_dump(exclude=_NOT_ARCHITECTURE, exclude_none=True)
        if self.preset == type(self).model_fields["preset"].default:
            del changed["preset"]
        if self.init and changed:
            raise ValueError(
                f"{', '.join(changed)}: cannot be set for an existing model (init); "
                f"remove {'them' if len(changed) > 1 else 'it'}, or remove init"
            )
        return self

    def shape(self, vocab_size: int) -> ModelConfig:
        """Return the architecture of a new model with a vocabulary of `vocab_size` tokens."""
        changes = self.model_dump(exclude=_NOT_ARCHITECTURE | {"preset"}, exclude_none=True)
        return ModelConfig(**(PRESETS[self.preset] | changes | {"vocab_size": vocab_size}))


class LoRASettings(Settings):
    """A LoRA adapter (Hu et al. 2021)."""

    rank: Identity[int] = Field(
        8, ge=1, description="Rank of the low-rank matrices; 4 to 64 is usual."
    )
    alpha: Identity[float] = Field(
        16.0,
        gt=0,
        description="Scaling numerator: the low-rank update is multiplied by alpha / rank.",
    )
    dropout: Identity[float] = Field(
        0.0, ge=0, lt=1, description="Dropout probability on the input of the adapter."
    )
    targets: Identity[list[str]] = Field(
        default_factory=lambda: ["all"],
        min_length=1,
        description="Modules to adapt, by name (such as q_proj) or group: attention, mlp, all.",
    )


class DataFile(Settings):
    """Data by path (file, folder or glob) or dataset name, and the schema of its records."""

    path: str
    record_schema: SchemaName = Field("auto", alias="schema")  # `schema` is a method of BaseModel


class Source(DataFile):
    """A source of training data and its weight: the number of repetitions per epoch."""

    weight: float = Field(1.0, gt=0, description="Repetitions per epoch; 0.5 = half of the data.")


def _data_file(value: object) -> object:
    """Accept `"path"` instead of a table."""
    return {"path": value} if isinstance(value, str) else value


def _source(value: object) -> object:
    """Accept `"path"` and `"path@weight"` instead of a table.

    A path that exists is never split at an "@".
    """
    if not isinstance(value, str) or os.path.exists(os.path.expanduser(value)):
        return _data_file(value)
    path, at, weight = value.rpartition("@")
    if at:
        try:
            return {"path": path, "weight": float(weight)}
        except ValueError:
            pass  # the "@" is part of the path
    return {"path": value}


class DataSettings(Settings):
    """Training data, validation data, and the length of sequences."""

    sources: Identity[list[Annotated[Source, BeforeValidator(_source)]]] = Field(
        default_factory=list,
        description='Training data: "path", "path@weight" or {path, weight, schema}, where path '
        "is a file, folder, glob or the name of a published dataset; "
        "a weight of 3 repeats the data three times per epoch.",
    )
    validation: Identity[list[Annotated[DataFile, BeforeValidator(_data_file)]]] = Field(
        default_factory=list,
        description='Validation data: "path" or {path, schema}; default: part of the sources.',
    )
    validation_fraction: Identity[float] = Field(
        0.005,
        ge=0,
        le=0.5,
        description="Fraction of the sources held out for validation, 0 to 0.5; "
        "used when `validation` is empty.",
    )
    retention: Identity[list[Annotated[DataFile, BeforeValidator(_data_file)]]] = Field(
        default_factory=list,
        description="Retention set: validation data of another kind, to measure forgetting.",
    )
    variables: Identity[dict[str, str]] = Field(
        default_factory=dict,
        description="Values of template variables in the data, such as {{name}}.",
    )
    seq_len: Identity[int] = Field(512, ge=8, description="Sequence length, in tokens.")
    max_invalid_fraction: Operation[float] = Field(
        0.05,
        ge=0,
        le=1,
        description="Fraction of invalid records above which reading stops with an error, 0 to 1.",
    )
    store: Operation[str | None] = Field(
        None, description="Directory of the token stores; default: the cache directory."
    )


class OptimSettings(Settings):
    """Optimizer: AdamW (Loshchilov and Hutter 2019), or Muon with AdamW (Jordan et al. 2024)."""

    name: Identity[Literal["adamw", "muon"]] = Field(
        "muon", description="adamw; or muon for hidden weight matrices, with AdamW for the rest."
    )
    lr: Identity[float] = Field(1e-3, gt=0, description="Peak learning rate of AdamW.")
    muon_lr: Identity[float] = Field(0.02, gt=0, description="Peak learning rate of Muon.")
    momentum: Identity[float] = Field(0.95, ge=0, lt=1, description="Momentum coefficient of Muon.")
    beta1: Identity[float] = Field(
        0.9, ge=0, lt=1, description="Decay rate of the first moment of AdamW."
    )
    beta2: Identity[float] = Field(
        0.95, ge=0, lt=1, description="Decay rate of the second moment of AdamW."
    )
    eps: Identity[float] = Field(
        1e-8, gt=0, description="Epsilon of AdamW, added to the denominator."
    )
    weight_decay: Identity[float] = Field(
        0.1, ge=0, description="Decoupled weight decay, applied to matrices only."
    )
    grad_clip: Identity[float] = Field(
        1.0,
        gt=0,
        description="Maximum global L2 norm of the gradient; larger gradients are scaled down.",
    )


class ScheduleSettings(Settings):
    """Learning-rate schedule: warmup, then cosine decay, or constant and linear decay (WSD)."""

    name: Identity[Literal["cosine", "wsd"]] = Field(
        "cosine", description="cosine, or wsd (warmup, constant, linear decay)."
    )
    warmup: Identity[float] = Field(
        0.02,
        ge=0,
        le=1,
        description="Fraction of the steps in which the learning rate rises linearly, 0 to 1.",
    )
    decay: Identity[float | None] = Field(
        None,
        ge=0,
        le=1,
        description="Fraction of the steps in which the learning rate decays, 0 to 1; "
        "only for wsd, default 0.2.",
    )
    final: Identity[float] = Field(
        0.1,
        ge=0,
        le=1,
        description="Final learning rate as a fraction of the peak, 0 to 1.",
    )

    @model_validator(mode="before")
    @classmethod
    def _set_default_decay(cls, values: Any) -> Any:
        is_wsd = isinstance(values, dict) and values.get("name") == "wsd"
        return values | {"decay": 0.2} if is_wsd and values.get("decay") is None else values

    @model_validator(mode="after")
    def _check_phases(self) -> "ScheduleSettings":
        if self.name == "cosine" and self.decay is not None:
            raise ValueError(
                f"decay ({self.decay}) applies to wsd only, but the schedule is cosine; "
                'remove decay or set name = "wsd"'
            )
        if self.decay is not None and self.warmup + self.decay > 1:
            raise ValueError(
                f"warmup ({self.warmup}) and decay ({self.decay}) are fractions of the same steps "
                "and sum to more than 1; lower one of them"
            )
        return self


class TrainingSettings(Settings):
    """Number of steps, batch sizes, precision, backend, logging."""

    epochs: Identity[float] = Field(
        1.0,
        gt=0,
        description="Number of passes over the training data. It replaces `steps` of an extended "
        "recipe; `steps` beside it take precedence.",
    )
    steps: Identity[int | None] = Field(
        None, ge=1, description="Number of optimizer steps; default: determined by `epochs`."
    )
    global_batch_size: Identity[int] = Field(
        64, ge=1, description="Number of sequences per optimizer step, over all processes."
    )
    micro_batch_size: Operation[int | None] = Field(
        None,
        ge=1,
        description="Number of sequences per forward pass on one device; must divide "
        "`global_batch_size` (the rest is gradient accumulation); default: what fits into memory.",
    )
    precision: Identity[Literal["auto", "bf16", "fp16", "fp32"]] = Field(
        "auto",
        description="Mixed-precision (autocast) dtype; auto = bf16 if the hardware "
        "supports it, else fp16 on CUDA, else fp32.",
    )
    activation_checkpointing: Operation[bool] = Field(
        False,
        description="Recompute activations in the backward pass: less memory, slower steps.",
    )
    router_aux_loss_coef: Identity[float] = Field(
        0.01, ge=0, description="Coefficient of the load-balancing loss of a mixture of experts."
    )
    backend: Operation[Literal["torch", "deepspeed"]] = Field(
        "torch", description="Training backend: torch, or deepspeed, which shards memory (ZeRO)."
    )
    zero_stage: Operation[Literal[1, 2, 3]] = Field(
        2,
        description="ZeRO stage: 1 shards the optimizer state, 2 also gradients, 3 also weights; "
        "only for deepspeed.",
    )
    compile: Operation[bool] = Field(
        False,
        description="Compile the model with torch.compile; saves time only in long runs.",
    )
    log_every: Operation[int] = Field(
        10, ge=1, description="Number of optimizer steps between lines of metrics.jsonl."
    )
    trackers: Operation[list[Literal["tensorboard", "wandb", "swanlab"]]] = Field(
        default_factory=list,
        description="Experiment trackers to report metrics to: tensorboard, wandb, swanlab.",
    )

    @model_validator(mode="after")
    def _check_micro_batch_size(self) -> "TrainingSettings":
        if self.micro_batch_size and self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size ({self.global_batch_size}) must be a multiple of "
                f"micro_batch_size ({self.micro_batch_size})"
            )
        return self


class ValidationSettings(Settings):
    """Validation loss and sample continuations during training."""

    every: Operation[int] = Field(
        500,
        ge=1,
        description="Number of optimizer steps between validations; one more at the end.",
    )
    num_sequences: Identity[int] = Field(
        64, ge=1, description="Maximum number of sequences per validation."
    )
    prompts: Operation[list[str]] = Field(
        default_factory=list,
        description="Prompts for which a continuation is generated at each validation.",
    )


class CheckpointSettings(Settings):
    """When checkpoints are saved, and how many are kept."""

    every: Operation[int] = Field(
        500,
        ge=1,
        description="Number of optimizer steps between checkpoints; one more at the end.",
    )
    keep: Operation[int] = Field(2, ge=1, description="Number of most recent checkpoints to keep.")
    keep_best: Operation[bool] = Field(
        True, description="Also keep the checkpoint with the best validation result."
    )


class DPOSettings(Settings):
    """Direct preference optimization (Rafailov et al. 2023); only for the objective dpo."""

    loss: Identity[Literal["sigmoid", "ipo", "sigmoid_norm", "unlikelihood"]] = Field(
        "sigmoid",
        description="Loss function: sigmoid (DPO), ipo, sigmoid_norm (length-normalized DPO), or "
        "unlikelihood (against repetitions in rejected answers).",
    )
    beta: Identity[float] = Field(
        0.1,
        gt=0,
        description="Strength of the KL penalty toward the initial model; "
        "use about 5 with sigmoid_norm. With unlikelihood it only scales the reported rewards.",
    )
    unlikelihood_weight: Identity[float] = Field(
        2.0,
        gt=0,
        description="Weight of repeated tokens relative to the chosen answer; only for "
        "unlikelihood.",
    )
    label_smoothing: Identity[float] = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="Assumed probability that a preference label is wrong, below 0.5 (cDPO).",
    )

    @model_validator(mode="after")
    def _check_label_smoothing(self) -> "DPOSettings":
        if self.label_smoothing and self.loss in ("ipo", "unlikelihood"):
            raise ValueError(f"label_smoothing applies to the sigmoid losses, not to {self.loss}")
        return self


class Recipe(Settings):
    """All settings of one training stage."""

    objective: Identity[Literal["pretrain", "sft", "dpo"]] = Field(
        ..., description="Training objective: pretrain, sft (supervised fine-tuning) or dpo."
    )
    out: Operation[str | None] = Field(
        None, description="Run directory, to which everything is written."
    )
    tokenizer: Identity[str | None] = Field(
        None, description="Tokenizer or model directory; default: the tokenizer of `model.init`."
    )
    device: Operation[str] = Field(
        "auto", description="Device: auto, cpu, cuda, cuda:1 or mps; auto prefers CUDA, then MPS."
    )
    seed: Identity[int] = Field(
        0,
        ge=0,
        lt=1 << 63,
        description="Random seed of weight initialization, data order and dropout, 0 to 2^63 - 1.",
    )
    model: ModelSettings = Field(default_factory=lambda: ModelSettings())
    data: DataSettings = Field(default_factory=lambda: DataSettings())
    lora: Identity[LoRASettings | None] = Field(
        None, description="LoRA adapter to train instead of all weights; default: none."
    )
    optim: OptimSettings = Field(default_factory=lambda: OptimSettings())
    schedule: ScheduleSettings = Field(default_factory=lambda: ScheduleSettings())
    training: TrainingSettings = Field(default_factory=lambda: TrainingSettings())
    validation: ValidationSettings = Field(default_factory=lambda: ValidationSettings())
    checkpoint: CheckpointSettings = Field(default_factory=lambda: CheckpointSettings())
    dpo: DPOSettings = Field(default_factory=lambda: DPOSettings())

    _expand_home = field_validator("out", "tokenizer")(_with_home)

    def weighted_tokens(self, tokens: int) -> int:
        """Return the training tokens as a measure of time: DPO has a reference pass as well."""
        return tokens * (3 if self.objective == "dpo" else 2) // 2
