"""`minimind data list`, `info` and `get`: published datasets by name."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from minimind.cli import console
from minimind.cli.downloads import Yes, describe_size, get_datasets

if TYPE_CHECKING:
    from minimind.data.registry import Published, PublishedSet


def list_datasets(
    stage: Annotated[
        Literal["tokenizer", "pretrain", "sft", "lora", "dpo", "rl", "eval"] | None,
        typer.Option(help="Only data for this stage."),
    ] = None,
    language: Annotated[
        Literal["zh", "en"] | None, typer.Option(help="Only data in this language.")
    ] = None,
) -> None:
    """List published datasets that can be used by name."""
    from minimind.data.registry import find, registry

    rows = []
    for set_name, entry in registry().items():
        files = {name: find(f"{set_name}:{name}") for name in entry.files}
        matching = {
            name: file
            for name, file in files.items()
            if stage in (None, file.stage) and (language or "") in file.language
        }
        has_others = stage in (None, entry.stage) and (language or "") in entry.language
        names = [*matching, *(["…"] if entry.pattern and has_others else [])]
        if names:
            stages = dict.fromkeys(file.stage for file in matching.values()) or [entry.stage]
            row = [set_name, ", ".join(stages), entry.language, entry.licence, ", ".join(names)]
            rows.append(row)
    columns = ["set", "stages", "language", "licence", "files"]
    console.show(console.table("Published datasets", columns, rows))
    console.say("A name is SET:FILE. `minimind data info SET` shows all facts; … means more files.")


def info(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Dataset: SET or SET:FILE.")],
) -> None:
    """Describe a published dataset.

    Shows its origin, licence, files and hashes, as far as they are known.
    """
    from minimind.data.registry import data_folder, find, registry

    set_name, colon, _ = name.partition(":")
    if colon or set_name not in registry():
        find(name)  # an unknown name raises an error with similar ones
    entry = registry()[set_name]
    if colon:
        published = find(name)
        facts = _file_facts(published)
        console.show(console.table(published.name, ["fact", "value"], facts))
        return
    console.show(console.table(set_name, ["fact", "value"], _set_facts(entry)))
    rows = []
    for file_name in entry.files:
        each = find(f"{set_name}:{file_name}")
        downloaded = each.path_in(data_folder()).is_file()
        hashed = bool(each.file.sha256)
        size = describe_size(each)
        rows.append(
            [file_name, each.stage, each.record_schema, size, each.file.records, hashed, downloaded]
        )
    columns = ["file", "stage", "schema", "size", "records", "SHA-256", "here"]
    if rows:
        console.show(console.table("Files", columns, rows))


def _file_facts(published: "Published") -> list[tuple[str, object]]:
    """Return the facts about one file that differ from file to file."""
    from minimind.data.download import origin_of
    from minimind.data.registry import data_folder

    path = published.path_in(data_folder())
    facts: list[tuple[str, object]] = [
        ("set", published.set.title),
        ("path in the repository", published.file.path),
        ("stage", published.stage),
        ("language", published.language),
        ("schema", published.record_schema),
        ("licence", published.licence),
        ("size", describe_size(published)),
        ("records", published.file.records or "unknown"),
        ("SHA-256", published.file.sha256 or "unknown"),
        ("downloaded to", path if path.is_file() else "–"),
    ]
    origin = origin_of(path) or {}
    shown = ("hub", "repository", "revision", "bytes", "sha256")
    return facts + [(f"downloaded: {key}", origin[key]) for key in shown if key in origin]


def _set_facts(entry: "PublishedSet") -> list[tuple[str, object]]:
    tokens = f"{entry.tokens:,} (quoted)" if entry.tokens else "unknown"
    facts: list[tuple[str, object]] = [
        ("title", entry.title),
        ("licence", entry.licence),
        ("language", entry.language),
        ("tokens", tokens),
        ("Hugging Face", entry.hf or "–"),
        ("revision", entry.revision or "not pinned: the latest version"),
        ("ModelScope", f"{entry.modelscope} (latest version)" if entry.modelscope else "–"),
        ("other files", entry.pattern or "–"),
        ("facts from", entry.source),
    ]
    return [*facts, ("note", entry.note)] if entry.note else facts


def get(
    names: Annotated[list[str], typer.Argument(metavar="NAME", help="Datasets: SET or SET:FILE.")],
    yes: Yes = False,
    hub: Annotated[
        Literal["modelscope", "hf"] | None,  # typing may return that of data.hub: the same order
        typer.Option(help="Hub to download from; default: ModelScope if it has the data."),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--dir", help="Folder to download to. [default: $MINIMIND_DATA, or data]"),
    ] = None,
) -> None:
    """Download published datasets.

    Broken downloads are continued, and all are verified.
    """
    from minimind.data.registry import data_folder, find

    datasets = [find(name) for name in dict.fromkeys(names)]
    get_datasets(datasets, folder or data_folder(), yes=yes, hub=hub)
