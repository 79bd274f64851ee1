"""Build the tokenizer, the model and the objective of a stage from its recipe.

Training, `minimind plan` and `minimind checkpoints extract` share these functions, so that they
accept and refuse the same recipes. `datasets.py` builds the data.
"""

import hashlib
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from minimind.config.model import ModelConfig, RopeKind
from minimind.config.settings import Recipe
from minimind.errors import CheckpointError, ConfigError, ModelError, install_line
from minimind.model import Transformer, apply_lora, fused, load_model, resolve_model_directory
from minimind.model.saving import is_stray
from minimind.tokenizer import Tokenizer
from minimind.training.memory import Footprint
from minimind.training.objectives import Objective
from minimind.training.objectives.next_token import NextToken
from minimind.training.objectives.preference import Preference
from minimind.training.optimizers import count_moments
from minimind.training.precision import choose_precision
from minimind.training.run import TOKENIZER_COPY

_DEFAULT_VOCAB_SIZE = 6400  # of `minimind tokenizer train`


def check_recipe(recipe: Recipe) -> None:
    """Raise ConfigError for settings that contradict each other, before anything is read."""
    if recipe.lora and not recipe.model.init:
        raise ConfigError("lora: an adapter needs a base model; give --model MODEL")
    if recipe.lora and recipe.optim.name != "adamw":
        raise ConfigError('lora: adapters are trained with AdamW; set optim.name = "adamw"')
    if recipe.lora and recipe.model.context:
        raise ConfigError(
            f"lora: an adapter does not store model.context={recipe.model.context}, so it would be "
            "used with a model whose context is not extended. Extend the context first, by "
            "`minimind sft` with model.context, and train the adapter on that model"
        )
    if recipe.training.backend != "deepspeed":
        return
    if recipe.optim.name != "adamw":
        raise ConfigError('training.backend: deepspeed trains with AdamW; set optim.name = "adamw"')
    if recipe.training.compile:
        raise ConfigError("training.backend: deepspeed cannot be combined with training.compile")


def check_backend_installed(recipe: Recipe) -> None:
    """Raise ConfigError if DeepSpeed is needed to train, and not installed."""
    if recipe.training.backend == "deepspeed" and find_spec("deepspeed") is None:
        raise ConfigError(
            f"training.backend: deepspeed is not installed; {install_line('deepspeed')}"
        )


def needs_base(recipe: Recipe) -> bool:
    """Return True if resuming needs the base model in addition to a checkpoint.

    An adapter is trained on top of it; for DPO it is the reference model.
    """
    return bool(recipe.model.init and (recipe.lora or recipe.objective == "dpo"))


def load_tokenizer(recipe: Recipe, copy: Path | None = None) -> Tokenizer | None:
    """Load the tokenizer of a stage; None if the recipe names neither a tokenizer nor a model.

    copy: the tokenizer saved in a run that has begun. It is used instead of the base model's, and
    if the tokenizer that the recipe names was removed.
    """
    named = Path(recipe.tokenizer) if recipe.tokenizer else None
    if copy and copy.is_dir() and not (named and named.exists()):
        return Tokenizer.load(copy)
    if named:
        return Tokenizer.load(named)
    if recipe.model.init:
        return Tokenizer.load(resolve_model_directory(Path(recipe.model.init)))
    return None


def build_model(
    recipe: Recipe,
    tokenizer: Tokenizer | None,
    device: torch.device,
    *,
    saved: Mapping[str, Any] | None = None,
) -> Transformer:
    """Build or load the model that a stage trains.

    saved: the model configuration in a checkpoint that holds all weights; the base model is not
    read then. Without a tokenizer, a new model has the default vocabulary size.
    Raises ConfigError and ModelError.
    """
    check_recipe(recipe)
    torch.manual_seed(recipe.seed)
    if saved is not None:
        model = Transformer(ModelConfig.model_validate(saved)).to(device)
    elif recipe.model.init:
        directory = resolve_model_directory(Path(recipe.model.init))
        model = load_model(directory, device=device)
        if tokenizer:
            tokenizer.check_model(Path(recipe.tokenizer or directory), model.config.vocab_size)
    else:
        vocab_size = tokenizer.vocab_size if tokenizer else _DEFAULT_VOCAB_SIZE
        model = Transformer(recipe.model.shape(vocab_size)).to(device)
    is_extended = model.config.rope_scaling is not None
    if recipe.model.context and saved is None:
        _extend_context(model, recipe.model.context, recipe.model.rope_scaling)
    _check_seq_len(recipe, model, is_extended)
    if recipe.lora:
        torch.manual_seed(recipe.seed)
        apply_lora(model, recipe.lora)
    model.activation_checkpointing = recipe.training.activation_checkpointing
    return model


def build_initial_model(recipe: Recipe, tokenizer: Tokenizer) -> Transformer:
    """Build the untrained model of a pretraining recipe, on the CPU."""
    return build_model(recipe, tokenizer, torch.device("cpu"))


def _check_seq_len(recipe: Recipe, model: Transformer, is_extended: bool) -> None:
    """Raise ConfigError for sequences longer than the context.

    is_extended: the context was extended before this stage, so it cannot be extended again.
    """
    if recipe.data.seq_len > model.config.max_position_embeddings:
        remedy = "extend the context first, by `minimind sft` with " if recipe.lora else "raise "
        remedy += "model.context" if recipe.model.init else "model.max_position_embeddings"
        raise ConfigError(
            f"data.seq_len ({recipe.data.seq_len}) is longer than the model's context "
            f"({model.config.max_position_embeddings}); lower it"
            + ("" if is_extended else f", or {remedy}")
        )


def _extend_context(model: Transformer, context: int, kind: RopeKind | None) -> None:
    current = model.config.max_position_embeddings
    if context < current:
        raise ConfigError(
            f"model.context={context} is shorter than the model's own context of {current} tokens; "
            "leave it out"
        )
    model.extend_context(context, kind)


def build_tokenizer_and_model(
    recipe: Recipe, run: Path, device: torch.device, state: Mapping[str, Any]
) -> tuple[Tokenizer, Transformer]:
    """Build the tokenizer and the model that a stage starts or resumes with.

    state: that of the checkpoint to resume from, whose weights are loaded later; else empty.
    """
    tokenizer = load_tokenizer(recipe, run / TOKENIZER_COPY if state else None)
    config = None if needs_base(recipe) else state.get("config")
    model = build_model(recipe, tokenizer, device, saved=config)
    if tokenizer is None and recipe.objective != "pretrain":
        raise ConfigError(
            "model.init is not set. Fine-tuning starts from a model: give --model MODEL, or "
            "model.init=MODEL"
        )
    if tokenizer is None:
        raise ConfigError(
            "tokenizer is not set, and a new model needs one. Train it with "
            "`minimind tokenizer train DATA --out DIR` and give --tokenizer DIR"
        )
    return tokenizer, model


def build_footprint(
    recipe: Recipe, model: Transformer, device: torch.device, num_processes: int = 1
) -> Footprint:
    """Return the quantities that determine the memory of a process in a training step."""
    shards = recipe.training.backend == "deepspeed"
    return Footprint(
        model.config,
        count_parameters(model),
        count_parameters(model, trained=True),
        count_moments(model, recipe.optim),
        recipe.data.seq_len,
        device.type,
        recipe.training.activation_checkpointing,
        stores_scores=device.type == "cpu" and not _uses_kernels(recipe, device),
        zero_stage=recipe.training.zero_stage if shards else 0,
        num_processes=num_processes,
    )


def _uses_kernels(recipe: Recipe, device: torch.device) -> bool:
    """Return True if the training step calls the compiled kernels."""
    is_bf16 = choose_precision(recipe.training.precision, device).name == "bf16"
    return is_bf16 and not recipe.training.compile and fused.unavailable_reason() is None


def count_parameters(model: Transformer, *, trained: bool = False) -> int:
    """Count all parameters, or only the trained ones."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


def build_objective(recipe: Recipe, tokenizer: Tokenizer, device: torch.device) -> Objective:
    """Build the training objective of the recipe."""
    balance = recipe.training.router_aux_loss_coef
    if recipe.objective == "dpo":
        return Preference(recipe.dpo, router_aux_loss_coef=balance)
    return NextToken(tokenizer.token_bytes, device, router_aux_loss_coef=balance)


def check_base(recipe: Recipe, run: Path, state: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the base model's weights, or "" if checkpoints hold all weights.

    Raises CheckpointError if the run of `state` began with other weights, or if they are missing.
    """
    if not needs_base(recipe):
        return ""
    advice = "Restore it, choose another --out, or start over with --fresh"
    try:
        digest = _base_sha256(recipe)
    except ModelError as error:
        if not state:
            raise
        raise CheckpointError(
            f"{run} needs the base model that it began with: {error}. {advice}"
        ) from error
    if state and state.get("base_sha256") != digest:
        raise CheckpointError(
            f"{run}: {recipe.model.init} is not the base model that this run began with, and its "
            f"checkpoints are valid only with that model. {advice}"
        )
    return digest


def _base_sha256(recipe: Recipe) -> str:
    digest = hashlib.sha256()
    directory = resolve_model_directory(Path(recipe.model.init or ""))
    for file in sorted(directory.glob("*.safetensors")):
        if is_stray(file.name):
            continue
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
