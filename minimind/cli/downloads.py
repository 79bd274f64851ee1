"""Confirmation and progress of downloads, shared by all commands that download."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minimind.cli import console
from minimind.errors import UsageError

if TYPE_CHECKING:
    from minimind.data.hub import Hub, HubFile
    from minimind.data.registry import Published

Yes = Annotated[
    bool, typer.Option("--yes", help="Download data that is named, without asking first.")
]


def ensure_downloaded(paths: Iterable[str], yes: bool) -> None:
    """Download the datasets among `paths` that are given by name and are not there yet.

    Raises as `get_datasets`.
    """
    from minimind.data.download import is_available
    from minimind.data.registry import data_folder, find, is_name

    named = [find(path) for path in dict.fromkeys(paths) if is_name(path)]
    missing = [each for each in named if not is_available(each, each.path_in(data_folder()))]
    if missing:
        get_datasets(missing, data_folder(), yes=yes)


def get_datasets(
    datasets: "list[Published]", folder: Path, *, yes: bool, hub: "Hub | None" = None
) -> None:
    """Show licence and size, ask, and download into `folder` what is not there.

    Raises UsageError if nobody can be asked, typer.Exit if the user declines, and DataError for a
    download that fails.
    """
    from minimind.data.download import fetch, is_present, locate

    missing = [each for each in datasets if not is_present(each, each.path_in(folder))]
    if missing:
        check_terminal("; ".join(map(_describe, missing)), yes)
    located = [locate(each, folder, hub, console.say) for each in missing]
    rows = [
        [
            each.published.name,
            console.format_size(each.file.size),
            each.published.licence,
            f"{each.repository.host}/{each.repository.id} at {each.repository.branch[:12]}",
        ]
        for each in located
    ]
    if rows:
        console.show(console.table("Downloads", ["name", "size", "licence", "from"], rows))
        confirm(total_size([each.file for each in located]), folder, yes)
    for each in located:
        target = each.published.path_in(folder)
        with progress_bar(each.published.name, target) as progress:
            fetch(each, folder, progress=progress, say=console.say)
    for dataset in datasets:
        console.say(f"{dataset.name}: {dataset.path_in(folder)}")
    for note in dict.fromkeys(dataset.set.note for dataset in datasets if dataset.set.note):
        console.say(note)


def check_terminal(missing: str, yes: bool) -> None:
    """Raise UsageError, before any network access, if the user cannot be asked."""
    if not yes and not sys.stdin.isatty():
        raise UsageError(
            f"not downloaded yet: {missing}. Standard input is no terminal, so you cannot be "
            "asked; add --yes to accept the licence and download"
        )


def total_size(files: "Iterable[HubFile]") -> int | None:
    """Return the bytes of all files; None if the hub does not list the size of one."""
    sizes = [file.size for file in files]
    return None if None in sizes else sum(size for size in sizes if size)


def confirm(num_bytes: int | None, folder: Path, yes: bool) -> None:
    """Ask whether to download; raise typer.Exit if the answer is no."""
    question = f"Download {console.format_size(num_bytes)} to {folder}?"
    if num_bytes is None:
        question = f"Download a file of unknown size to {folder}?"
    if not yes and not typer.confirm(question, default=True):
        console.say("nothing was downloaded")
        raise typer.Exit(1)


@contextlib.contextmanager
def progress_bar(name: str, target: Path) -> Iterator[Callable[[int, int | None], None]]:
    """Draw the progress of one download; on Ctrl-C, say what is kept of `target`."""
    done = 0
    with console.make_progress("byte") as bar:
        task: Any = None

        def progress(position: int, total: int | None) -> None:
            nonlocal task, done
            done = position
            if task is None:
                task = bar.add_task(name, total=total, completed=position, note="")
            bar.update(task, completed=position, total=total)

        try:
            yield progress
        except KeyboardInterrupt:
            bar.stop()
            console.say(
                f"{name}: {console.format_size(done)} are kept in {target.parent}; the same "
                "command continues the download"
            )
            raise


def _describe(published: "Published") -> str:
    return f"{published.name} (size: {describe_size(published)}, licence: {published.licence})"


def describe_size(published: "Published") -> str:
    """Return the size that the registry records: exact, rounded or unknown."""
    file = published.file
    return f"{'about ' if file.rounded and file.bytes else ''}{console.format_size(file.bytes)}"
