"""Published models: which files of a repository make a model directory, and their download."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path, PurePosixPath

from filelock import FileLock, Timeout

from minimind.data.download import (
    Progress,
    Say,
    download_file,
    list_files_of,
    mirror_hint,
    part_of,
)
from minimind.data.hub import Hub, HubError, HubFile, Listing, Repository, TransientError
from minimind.errors import DataError, ModelError, UsageError
from minimind.files import read_json_object, write_json

ORIGIN_FILE = "origin.json"
_NAME = re.compile(r"(?:(hf|modelscope):)?([\w.-]+/[\w.-]+)", re.ASCII)
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_TOKENIZER_FILES = ("tokenizer.model", "merges.txt", "vocab.txt", "chat_template.jinja", "LICENSE")
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SUFFIXES = (".json", ".safetensors", ".part", ".tmp")  # that an unfinished folder may have
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")

OpenProgress = Callable[[str], AbstractContextManager[Progress]]  # by file name


def parse_model_name(name: str, revision: str | None) -> Repository:
    """Return the repository of `owner/name`, `hf:owner/name` or `modelscope:owner/name`.

    Raises UsageError for other names.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise UsageError(
            f"{name}: not the name of a published model; give OWNER/NAME as on Hugging Face, or "
            "modelscope:OWNER/NAME"
        )
    hub: Hub = "modelscope" if match[1] == "modelscope" else "hf"
    return Repository(hub, match[2], revision, "models")


def list_model(repository: Repository, say: Say) -> tuple[Listing, list[HubFile]]:
    """Return the repository's listing and the files to download, the configuration first.

    Raises DataError if the hub cannot be reached or has no such model, and ModelError if the
    weights are not in safetensors.
    """
    try:
        listing = list_files_of(repository, say)
    except TransientError as error:
        raise DataError(
            f"{repository.id}: {error.host} cannot be reached ({error}){mirror_hint(repository)}"
        ) from error
    return listing, _select_files(listing)


def _select_files(listing: Listing) -> list[HubFile]:
    names = set(listing.files)
    if _WEIGHTS in names:
        weights = {_WEIGHTS}
    elif _INDEX in names:
        weights = {name for name in names if _SHARD.fullmatch(name)}
    else:  # an adapter
        weights = {name for name in names if name.endswith(".safetensors") and "/" not in name}
    repository = listing.repository
    where = f"{repository.host}/{repository.id}"
    if not weights:
        pickles = sorted(name for name in names if PurePosixPath(name).suffix in _PICKLES)
        reason = (
            f"its weights are pickle files ({', '.join(pickles[:3])}), which can run any code when "
            "they are loaded. Ask its publisher for safetensors, or look for a converted copy"
            if pickles
            else "it has no safetensors file"
        )
        raise ModelError(f"{where}: nothing was downloaded: {reason}")
    others = {
        name
        for name in names
        if "/" not in name and (name.endswith(".json") or name in _TOKENIZER_FILES)
        if name != "pytorch_model.bin.index.json"
    }
    if not {"config.json", "adapter_config.json"} & others:
        raise ModelError(f"{where}: it has no config.json, so it is not a model directory")
    ordered = [*sorted(others - {"config.json"}, reverse=True), *sorted(weights)]
    first = ["config.json"] if "config.json" in others else []
    return [listing.files[name] for name in [*first, *ordered]]


def is_downloaded(repository: Repository, target: Path) -> bool:
    """Return True if a directory is a complete download of this repository and revision.

    Raises UsageError if it is anything else.
    """
    if not target.exists():
        return False
    try:
        origin = read_json_object(target / ORIGIN_FILE)
    except (OSError, ValueError):
        origin = {}
    wanted = (repository.hub, repository.id)
    same_revision = repository.revision in (None, origin.get("revision"), origin.get("requested"))
    if (origin.get("hub"), origin.get("repository")) == wanted and same_revision:
        return True
    raise UsageError(f"{target} exists and is not this model; choose another --out, or remove it")


def download_model(
    listing: Listing,
    files: list[HubFile],
    target: Path,
    *,
    requested: str | None,
    progress: OpenProgress,
    say: Say,
) -> None:
    """Download the files of a model; the directory `target` appears only when it is complete.

    An interrupted download is kept in `TARGET.part` and continued; files of another model or
    version there are removed. requested: the revision that the user gave. Raises DataError for a
    download that fails, and UsageError if another process downloads to `target`, or if
    `TARGET.part` has files that no download leaves.
    """
    with _lock(target):
        if not is_downloaded(listing.repository, target):  # by another process meanwhile
            _download_model(listing, files, target, requested, progress, say)


@contextmanager
def _lock(target: Path) -> Iterator[None]:
    """Hold the lock of a download; the operating system releases it if the process dies."""
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(
            f"another process is downloading to {target}; wait until it has finished, or choose "
            "another --out"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _download_model(
    listing: Listing,
    files: list[HubFile],
    target: Path,
    requested: str | None,
    progress: OpenProgress,
    say: Say,
) -> None:
    repository = listing.repository
    folder = unfinished_folder(target)
    _remove_others(folder, files, say)
    for file in files:
        path = folder / file.path
        try:
            with progress(file.path) as report:
                download_file(repository, file, path, progress=report, say=say)
        except HubError as error:
            raise DataError(f"{repository.id}: {error}") from error
        except TransientError as error:
            raise DataError(
                f"{repository.id}: the connection to {error.host} failed repeatedly ({error}). "
                f"What is downloaded so far is kept in {folder}; the same command continues"
            ) from error
    origin = {
        "hub": repository.hub,
        "repository": repository.id,
        "revision": repository.branch,
        "requested": requested,
        "licence": listing.licence,
        "files": {file.path: file.sha256 or file.blob_id for file in files},
    }
    for lock in folder.glob(".*.lock"):
        lock.unlink()
    write_json(folder / ORIGIN_FILE, origin)
    os.replace(folder, target)


def _remove_others(folder: Path, files: list[HubFile], say: Say) -> None:
    """Remove the files of another model or version that an interrupted download left."""
    listed = {folder / file.path for file in files}
    parts = {part_of(folder / file.path, file) for file in files}
    others = sorted({*folder.glob("*")} - {*folder.glob(".*.lock")} - listed - parts)
    for path in others:
        is_download = path.suffix in _SUFFIXES or path.name in _TOKENIZER_FILES
        if not (is_download and path.is_file()):
            raise UsageError(
                f"{folder} contains other files, such as {path.name}; move them, or choose another "
                "--out"
            )
    if others:
        names = ", ".join(path.name for path in others)
        say(f"removing files of another model or version from {folder}: {names}")
    for path in others:
        path.unlink()


def unfinished_folder(target: Path) -> Path:
    """Return where the files of a model are until all of them are complete."""
    return target.with_name(f"{target.name}.part")
