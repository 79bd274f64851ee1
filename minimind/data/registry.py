"""Published datasets by name: what `registry.toml` records of each, and where they are stored.

`SET` names the default file of a set, `SET:FILE` another one. A set of many parts has a pattern:
`skypile:2020-40_zh_head_0003` is the file `data/2020-40_zh_head_0003.jsonl` of its repository.
Files are stored as `SET/FILE` in the folder `$MINIMIND_DATA`, by default `data`.
"""

import difflib
import os
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from minimind.data.hub import HUB_NAMES, HUBS, Hub, Repository
from minimind.errors import DataError, UsageError, shell_words
from minimind.paths import expand_user

FOLDER_VARIABLE = "MINIMIND_DATA"
Stage = Literal["tokenizer", "pretrain", "sft", "lora", "dpo", "rl", "eval"]
Language = Literal["zh", "en", "zh+en"]


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PublishedFile(_Facts):
    """A file of a set. A fact that is None is that of the set, or unknown."""

    path: str = Field(description="in the repository")
    bytes: int | None = Field(None, ge=0)
    rounded: bool = Field(False, description="the size is a rounded one")
    records: int | None = None
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    save_as: str | None = None
    stage: Stage | None = None
    language: Language | None = None
    record_schema: str | None = Field(None, alias="schema")
    licence: str | None = None


class PublishedSet(_Facts):
    """A set of files in one repository; see the head of `registry.toml`."""

    title: str
    stage: Stage
    language: Language
    record_schema: str = Field(alias="schema")
    licence: str
    source: str
    tokens: int | None = None
    hf: str | None = None
    revision: str | None = None
    modelscope: str | None = None
    default: str | None = None
    pattern: str | None = None
    note: str = ""
    files: dict[str, PublishedFile] = {}

    def repository(self, hub: Hub) -> Repository | None:
        """Return the repository on a hub; None if the set is not published there."""
        id = self.hf if hub == "hf" else self.modelscope
        return Repository(hub, id, self.revision if hub == "hf" else None) if id else None


@dataclass(frozen=True)
class Published:
    """A file of a set, under the name that users give it."""

    name: str  # "skypile:2020-40_zh_head_0000"
    set: PublishedSet
    file: PublishedFile

    @property
    def stage(self) -> Stage:
        return self.file.stage or self.set.stage

    @property
    def language(self) -> Language:
        return self.file.language or self.set.language

    @property
    def record_schema(self) -> str:
        return self.file.record_schema or self.set.record_schema

    @property
    def licence(self) -> str:
        return self.file.licence or self.set.licence

    def path_in(self, folder: Path) -> Path:
        """Return where the file is stored below a data folder."""
        name = self.name.replace(":", "/", 1) + PurePosixPath(self.file.path).suffix
        return folder / (self.file.save_as or name)

    def repositories(self, hub: Hub | None = None) -> list[Repository]:
        """Return the repositories that have the set, the preferred one first.

        hub: only that one. Raises UsageError if the set is not published there.
        """
        available = {each: self.set.repository(each) for each in HUBS}
        found = [r for each, r in available.items() if r and hub in (None, each)]
        if not found and hub:
            others = ", ".join(HUB_NAMES[each] for each, r in available.items() if r)
            raise UsageError(f"{self.name} is not on {HUB_NAMES[hub]}, but on {others}; omit --hub")
        return found


@cache
def registry() -> dict[str, PublishedSet]:
    """Return all sets by name, in the order of the file."""
    text = (files("minimind.data") / "registry.toml").read_text("utf-8")
    return {name: PublishedSet(**entry) for name, entry in tomllib.loads(text).items()}


def data_folder() -> Path:
    """Return the folder of downloaded data: `$MINIMIND_DATA`, by default `data`."""
    return expand_user(os.environ.get(FOLDER_VARIABLE) or "data")


def is_name(text: str) -> bool:
    """Return True if `text` is the name of a set or of a file in it, and no path that exists."""
    return text.partition(":")[0] in registry() and not os.path.exists(text)


def find(name: str) -> Published:
    """Return the file that a name stands for. Raises UsageError with similar names."""
    set_name, _, file_name = name.partition(":")
    entry = registry().get(set_name)
    if entry is None:
        raise UsageError(
            f"there is no dataset {set_name!r}{similar(set_name, registry())}; "
            "`minimind data list` shows all"
        )
    chosen = file_name or entry.default
    if chosen is None:
        raise UsageError(f"{set_name} has several files; name one: {_known_files(set_name)}")
    # The name of a file in its repository is accepted as well.
    by_path = {PurePosixPath(file.path).stem: key for key, file in entry.files.items()}
    chosen = by_path.get(chosen, chosen)
    if chosen in entry.files:
        return Published(f"{set_name}:{chosen}", entry, entry.files[chosen])
    if entry.pattern and not {"", ".", ".."} & set(chosen.split("/")):
        file = PublishedFile(path=entry.pattern.format(name=chosen))
        return Published(f"{set_name}:{chosen}", entry, file)
    raise UsageError(
        f"{set_name} has no file {chosen!r}{similar(chosen, entry.files)}; "
        f"it has {_known_files(set_name)}"
    )


def downloaded_file(name: str) -> Path:
    """Return the downloaded file of a name. Raises DataError with the command if there is none."""
    published = find(name)
    path = published.path_in(data_folder())
    if not path.is_file():
        raise DataError(
            f"{name} is not in {path.parent}; download it first: "
            f"minimind {shell_words('data', 'get', name)}"
        )
    return path


def download_hint(name: str) -> str:
    """Return the end of an error message that names the download command, or ""."""
    return f". `minimind data get {name}` downloads it" if name in registry() else ""


def similar(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean …?" with the most similar known name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _known_files(set_name: str) -> str:
    entry = registry()[set_name]
    names = [f"{set_name}:{name}" for name in entry.files]
    if entry.pattern:
        names.append(f"{set_name}:NAME for the file {entry.pattern.format(name='NAME')}")
    return ", ".join(names)
