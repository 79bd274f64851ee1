"""Everything a stage consists of: tokenizer, model, objective and data, built from a recipe.

`train`, `plan` and `checkpoints extract` build by these functions, so that all refuse the same.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from minimind.config.model import ModelConfig, RopeKind
from minimind.config.settings import DataFile, Recipe
from minimind.data.packing import (
    ChatSequences,
    MixedDataset,
    PairSequences,
    Sequences,
    TextSequences,
)
from minimind.data.read import first_record
from minimind.data.store import Kind, Split, TokenStore, default_folder, open_store
from minimind.data.textbook import textbook_file
from minimind.errors import ConfigError, DataError, install_line
from minimind.model import Transformer, apply_lora, load_model, resolve_model_directory
from minimind.model.directory import is_stray
from minimind.tokenizer import Tokenizer
from minimind.training.memory import Footprint
from minimind.training.objectives import Objective
from minimind.training.objectives.next_token import NextToken
from minimind.training.objectives.preference import Preference
from minimind.training.optimizers import count_moments
from minimind.training.reporter import Reporter, pluralize

DEFAULT_VOCAB = 6400  # of a tokenizer that is not there yet
KINDS: dict[str, Kind] = {"pretrain": "text", "sft": "chat", "dpo": "pairs"}


def check_recipe(recipe: Recipe) -> None:
    """Raise ConfigError for settings that contradict each other, before anything is read."""
    if recipe.lora and not recipe.model.init:
        raise ConfigError("lora: adapters are made for a model that is there; give --model MODEL")
    if recipe.lora and recipe.optim.name != "adamw":
        raise ConfigError('lora: adapters are trained with AdamW; set optim.name = "adamw"')
    if recipe.lora and recipe.model.context:
        raise ConfigError(
            f"lora: an adapter does not remember model.context={recipe.model.context}, and would "
            "be used beside a model that is not stretched; stretch the model first, by "
            "`minimind sft` with model.context, and give that one"
        )
    if recipe.training.backend != "deepspeed":
        return
    if find_spec("deepspeed") is None:
        raise ConfigError(
            f"training.backend: deepspeed is not installed; {install_line('deepspeed')}"
        )
    if recipe.optim.name != "adamw":
        raise ConfigError('training.backend: deepspeed trains by AdamW; set optim.name = "adamw"')
    if recipe.training.compile:
        raise ConfigError("training.backend: deepspeed does not go with training.compile")


def needs_base(recipe: Recipe) -> bool:
    """True if the checkpoints of a run are not enough: adapters are trained beside the base model,
    and preferences are compared with it."""
    return bool(recipe.model.init and (recipe.lora or recipe.objective == "dpo"))


def load_tokenizer(recipe: Recipe, kept: Path | None = None) -> Tokenizer | None:
    """The tokenizer of the stage; None if the recipe names neither a tokenizer nor a model.

    `kept`: the copy that a run which has begun keeps. It stands in for that of the base model, and
    for one that was removed.
    """
    own = Path(recipe.tokenizer) if recipe.tokenizer else None
    if kept and kept.is_dir() and not (own and own.exists()):
        return Tokenizer.load(kept)
    if own:
        return Tokenizer.load(own)
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
    """The model that the stage trains.

    `saved`: the configuration in a checkpoint that holds all weights; then only the shape is built,
    and the base model is not read. Without a tokenizer a new model gets our default vocabulary.
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
        vocab_size = tokenizer.vocab_size if tokenizer else DEFAULT_VOCAB
        model = Transformer(recipe.model.shape(vocab_size)).to(device)
    if recipe.model.context and saved is None:
        _stretch(model, recipe.model.context, recipe.model.rope_scaling)
    _check_window(recipe, model)
    if recipe.lora:
        torch.manual_seed(recipe.seed)
        apply_lora(model, recipe.lora)
    model.activation_checkpointing = recipe.training.activation_checkpointing
    return model


def new_model(recipe: Recipe, tokenizer: Tokenizer) -> Transformer:
    """The model that the recipe begins with when it begins from zero, on the CPU."""
    return build_model(recipe, tokenizer, torch.device("cpu"))


def _check_window(recipe: Recipe, model: Transformer) -> None:
    if recipe.data.seq_len > model.config.max_position_embeddings:
        raise ConfigError(
            f"data.seq_len ({recipe.data.seq_len}) is longer than the model's context "
            f"({model.config.max_position_embeddings}); lower it, or "
            + ("stretch the model first, by `minimind sft` with " if recipe.lora else "raise ")
            + ("model.context" if recipe.model.init else "model.max_position_embeddings")
        )


def _stretch(model: Transformer, context: int, kind: RopeKind | None) -> None:
    own = model.config.max_position_embeddings
    if context < own:
        raise ConfigError(
            f"model.context={context} is within what the model reads as it is, {own} tokens; "
            "leave it out"
        )
    model.extend_context(context, kind)


def footprint(recipe: Recipe, model: Transformer, device: torch.device) -> Footprint:
    """What memory a step of the stage depends on."""
    return Footprint(
        model.config,
        count_parameters(model),
        count_parameters(model, trained=True),
        count_moments(model, recipe.optim),
        recipe.data.seq_len,
        device.type,
        recipe.training.activation_checkpointing,
    )


def count_parameters(model: Transformer, *, trained: bool = False) -> int:
    """Number of parameters, or of those that are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


@dataclass(frozen=True)
class Stores:
    """The token stores of a stage."""

    sources: list[TokenStore]
    validation: list[TokenStore]  # when held-out data is given on its own
    retention: list[TokenStore]

    @property
    def all(self) -> list[TokenStore]:
        return [*self.sources, *self.validation, *self.retention]


def open_stores(recipe: Recipe, tokenizer: Tokenizer, reporter: Reporter) -> Stores:
    """Tokenize the data, or find it tokenized. Raises what reading the data raises."""
    settings = recipe.data
    if not settings.sources:
        raise ConfigError("data.sources is empty: give --data FILE, or set it in the recipe")
    own = bool(settings.validation)
    folder = Path(settings.store) if settings.store else default_folder()
    objective_kind = KINDS[recipe.objective]

    def opened(
        source: DataFile, fraction: float = 0.0, kind: Kind | None = objective_kind
    ) -> TokenStore:
        path = textbook_file(source.path, folder, settings.variables)
        begun = False

        def progress(done: int, total: int) -> None:
            nonlocal begun
            if not begun:  # not of a store that is there
                reporter.start(f"tokenizing {path}", total, unit="byte")
                begun = True
            reporter.progress(done, total)

        try:
            return open_store(
                path,
                tokenizer,
                kind=kind or _kind_of(path, source.record_schema),
                schema=source.record_schema,
                variables=settings.variables,
                validation_fraction=fraction,
                max_invalid_fraction=settings.max_invalid_fraction,
                folder=folder,
                progress=progress,
                say=reporter.say,
            )
        finally:
            reporter.stop()

    stores = Stores(
        [
            opened(source, 0.0 if own else settings.validation_fraction)
            for source in settings.sources
        ],
        [opened(source) for source in settings.validation],
        [opened(source, kind=None) for source in settings.retention],
    )
    filled = [store.manifest["substituted"] for store in stores.all]
    for key in sorted(settings.variables.keys() - set().union(*filled)):
        reporter.say(f"data.variables.{key} fills nothing: no record holds {{{{{key}}}}}")
    return stores


def build_objective(recipe: Recipe, tokenizer: Tokenizer, device: torch.device) -> Objective:
    """The loss that the recipe trains for."""
    balance = recipe.training.router_aux_loss_coef
    if recipe.objective == "dpo":
        return Preference(recipe.dpo, router_balance=balance)
    return NextToken(tokenizer.token_bytes, device, router_balance=balance)


def _kind_of(path: str, schema: str) -> Kind:
    """A general set is what it is, whatever the objective: conversations or running text."""
    return "chat" if first_record(path, schema).messages else "text"


def data_sha256(stores: Stores) -> str:
    """The sha256 of the texts, and of how they became tokens: a run keeps to both."""
    keys = ("kind", "schema", "variables", "validation_fraction", "tokenizer_sha256")
    described = [
        [store.manifest[key] for key in keys] + [file["sha256"] for file in store.manifest["files"]]
        for store in stores.all
    ]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def base_sha256(recipe: Recipe) -> str:
    """The sha256 of the base model's weights."""
    digest = hashlib.sha256()
    directory = resolve_model_directory(Path(recipe.model.init or ""))
    for file in sorted(directory.glob("*.safetensors")):
        if is_stray(file.name):
            continue
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def build_mixes(
    recipe: Recipe, tokenizer: Tokenizer, stores: Stores, reporter: Reporter
) -> tuple[MixedDataset, MixedDataset | None, list[MixedDataset]]:
    """Training data as a weighted mix, held-out data, and general sets, each cut into windows."""

    def sequences(store: TokenStore, split: Split) -> Sequences:
        shards = store.shards(split)
        if store.manifest["kind"] == "text":
            return TextSequences(shards, recipe.data.seq_len)
        pairs = store.manifest["kind"] == "pairs"
        packed = (PairSequences if pairs else ChatSequences)(
            shards, recipe.data.seq_len, pad=tokenizer.end_of_text, seed=recipe.seed
        )
        if split == "train" and store in stores.sources:
            report = packed.report
            alike = f", {report.identical:,} because both sides are the same" * pairs
            reporter.say(
                f"{pluralize(report.items, 'pair' if pairs else 'conversation')} in "
                f"{pluralize(report.sequences, 'sequence')}, {report.packing_efficiency:.1%} full; "
                f"{report.truncated:,} truncated, {report.unsupervised:,} left out because no "
                f"answer was left{alike}"
            )
        return packed

    weights = [source.weight for source in recipe.data.sources]
    data = MixedDataset(
        [sequences(store, "train") for store in stores.sources], weights, recipe.seed
    )
    if not data.order.epoch_size:
        raise DataError(
            f"the data gives not one window of {recipe.data.seq_len} tokens; "
            "use more text, or a smaller data.seq_len"
        )
    parts = [sequences(store, "train") for store in stores.validation] or [
        sequences(store, "validation") for store in stores.sources
    ]
    held_out = MixedDataset(parts, [1.0] * len(parts), recipe.seed)
    if not held_out.order.epoch_size:
        reporter.say("too little text is held out for a validation; give data.validation")
    retention = [
        MixedDataset([sequences(store, "train")], [1.0], recipe.seed) for store in stores.retention
    ]
    return (
        data,
        held_out if held_out.order.epoch_size else None,
        [mix for mix in retention if mix.order.epoch_size],
    )
