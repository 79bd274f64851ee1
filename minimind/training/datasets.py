"""Build the data of a stage: token stores, and datasets of packed sequences from them."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimind.config.settings import DataFile, DataSettings, Recipe
from minimind.data.download import origin_of
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
from minimind.errors import ConfigError, DataError
from minimind.paths import expand_user
from minimind.tokenizer import Tokenizer
from minimind.training.reporter import Reporter, pluralize

KINDS: dict[str, Kind] = {"pretrain": "text", "sft": "chat", "dpo": "pairs"}  # by objective


@dataclass(frozen=True)
class Stores:
    """The token stores of a stage."""

    sources: list[TokenStore]
    validation: list[TokenStore]  # empty if a fraction of the sources is held out instead
    retention: list[TokenStore]

    @property
    def all(self) -> list[TokenStore]:
        return [*self.sources, *self.validation, *self.retention]


@dataclass(frozen=True)
class Datasets:
    """The datasets of a stage."""

    train: MixedDataset
    validation: MixedDataset | None
    retention: list[MixedDataset]  # measure what fine-tuning forgets


def open_stores(recipe: Recipe, tokenizer: Tokenizer, reporter: Reporter) -> Stores:
    """Tokenize the data, or open the stores of an earlier run.

    Raises ConfigError if there are no sources, and the errors of reading them.
    """
    settings = recipe.data
    if not settings.sources:
        raise ConfigError("data.sources is empty: give --data FILE, or set it in the recipe")
    kind = KINDS[recipe.objective]
    fraction = 0.0 if settings.validation else settings.validation_fraction
    stores = Stores(
        [
            _open_store(source, kind, settings, tokenizer, reporter, fraction)
            for source in settings.sources
        ],
        [
            _open_store(source, kind, settings, tokenizer, reporter)
            for source in settings.validation
        ],
        [_open_store(source, None, settings, tokenizer, reporter) for source in settings.retention],
    )
    substituted = [store.manifest["substituted"] for store in stores.all]
    for key in sorted(settings.variables.keys() - set().union(*substituted)):
        reporter.say(f"data.variables.{key} is not used: no record contains {{{{{key}}}}}")
    return stores


def _open_store(
    source: DataFile,
    kind: Kind | None,
    settings: DataSettings,
    tokenizer: Tokenizer,
    reporter: Reporter,
    validation_fraction: float = 0.0,
) -> TokenStore:
    """Open the store of one file. kind: None means detect text or conversations."""
    folder = expand_user(settings.store) if settings.store else default_folder()
    path = textbook_file(source.path, folder, settings.variables)
    if kind is None:
        kind = "chat" if first_record(path, source.record_schema).messages else "text"
    started = False

    def progress(done: int, total: int) -> None:
        nonlocal started
        if not started:  # an existing store is opened without a progress bar
            reporter.start(f"tokenizing {path}", total, unit="byte")
            started = True
        reporter.progress(done, total)

    try:
        return open_store(
            path,
            tokenizer,
            kind=kind,
            schema=source.record_schema,
            variables=settings.variables,
            validation_fraction=validation_fraction,
            max_invalid_fraction=settings.max_invalid_fraction,
            folder=folder,
            progress=progress,
            say=reporter.say,
        )
    finally:
        reporter.stop()


def data_sha256(stores: Stores) -> str:
    """Return the SHA-256 of the data files and the settings that they were tokenized with."""
    keys = ("kind", "schema", "variables", "validation_fraction", "tokenizer_sha256")
    identity = [
        [store.manifest[key] for key in keys] + [file["sha256"] for file in store.manifest["files"]]
        for store in stores.all
    ]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def data_origins(stores: Stores) -> dict[str, Any]:
    """Return the name, revision, hash and licence of each downloaded file that a stage uses.

    The hash is that of the file as it was tokenized; `modified` marks one that is not the
    published one.
    """
    origins = []
    for file in (file for store in stores.all for file in store.manifest["files"]):
        if origin := origin_of(Path(file["path"])):
            del origin["stamp"]
            modified = {"modified": True} if origin["sha256"] != file["sha256"] else {}
            origins.append(origin | {"sha256": file["sha256"]} | modified)
    return {"datasets": origins} if origins else {}


def build_datasets(
    recipe: Recipe, tokenizer: Tokenizer, stores: Stores, reporter: Reporter
) -> Datasets:
    """Pack the stores into sequences and mix the sources by weight.

    Raises DataError if there is less than one training sequence.
    """

    def pack(store: TokenStore, split: Split) -> Sequences:
        packed = _pack(store, split, recipe, tokenizer)
        if (
            split == "train"
            and store in stores.sources
            and isinstance(packed, ChatSequences | PairSequences)
        ):
            reporter.say(_describe_packing(packed))
        return packed

    weights = [source.weight for source in recipe.data.sources]
    train = MixedDataset([pack(store, "train") for store in stores.sources], weights, recipe.seed)
    if not train.order.epoch_size:
        raise DataError(
            f"the data does not fill one sequence of {recipe.data.seq_len} tokens; "
            "use more text, or a smaller data.seq_len"
        )
    held_out = [pack(store, "train") for store in stores.validation] or [
        pack(store, "validation") for store in stores.sources
    ]
    validation = MixedDataset(held_out, [1.0] * len(held_out), recipe.seed)
    if not validation.order.epoch_size:
        reporter.say("too little text is held out for validation; give data.validation")
    retention = [
        MixedDataset([pack(store, "train")], [1.0], recipe.seed) for store in stores.retention
    ]
    return Datasets(
        train,
        validation if validation.order.epoch_size else None,
        [dataset for dataset in retention if dataset.order.epoch_size],
    )


def _pack(store: TokenStore, split: Split, recipe: Recipe, tokenizer: Tokenizer) -> Sequences:
    """Cut the documents of a store into sequences of `data.seq_len` tokens."""
    shards = store.shards(split)
    if store.manifest["kind"] == "text":
        return TextSequences(shards, recipe.data.seq_len)
    return (PairSequences if store.manifest["kind"] == "pairs" else ChatSequences)(
        shards, recipe.data.seq_len, pad_id=tokenizer.end_of_text, seed=recipe.seed
    )


def _describe_packing(packed: ChatSequences | PairSequences) -> str:
    """Describe how many conversations or pairs were packed, truncated and left out."""
    report, pairs = packed.report, isinstance(packed, PairSequences)
    identical = f", {report.identical:,} because chosen and rejected are identical" * pairs
    return (
        f"{pluralize(report.items, 'pair' if pairs else 'conversation')} in "
        f"{pluralize(report.sequences, 'sequence')}, {report.packing_efficiency:.1%} full; "
        f"{report.truncated:,} truncated, {report.unsupervised:,} left out because they have "
        f"no supervised tokens{identical}"
    )
