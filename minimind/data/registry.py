"""Published data sets by name: what `registry.toml` says of each.

`NAME` means a set's default file, `NAME:FILE` another of its files. A set of many parts names them
by a pattern: `skypile:2020-40_zh_head_0003` is `data/2020-40_zh_head_0003.jsonl`.
"""

import difflib
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from minimind.errors import UsageError


class PublishedFile(BaseModel):
    """One file of a set; what is None is as in the set, or unknown."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    bytes: int | None = Field(None, ge=0)
    about: bool = False  # the size was quoted, not measured
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    save_as: str | None = None
    stage: str | None = None
    language: str | None = None
    schema_: str | None = Field(None, alias="schema")
    licence: str | None = None


class PublishedSet(BaseModel):
    """An entry of the registry."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    stage: str
    language: str
    schema_: str = Field(alias="schema")
    licence: str
    source: str
    tokens: int | None = None
    hf: str | None = None
    revision: str = "main"
    modelscope: str | None = None
    modelscope_revision: str = "master"
    default: str | None = None
    pattern: str | None = None
    files: dict[str, PublishedFile] = {}


@dataclass(frozen=True)
class Published:
    """A file of a set, with the name under which a user asks for it."""

    name: str  # "skypile:2020-40_zh_head_0000"
    set: PublishedSet
    file: PublishedFile

    @property
    def file_name(self) -> str:
        """Name under which it is saved."""
        return self.file.save_as or self.file.path.rsplit("/", 1)[-1]

    def fact(self, key: str) -> Any:
        """Return `stage`, `language`, `schema_` or `licence`: the file's, or else the set's."""
        own = getattr(self.file, key)
        return getattr(self.set, key) if own is None else own


@cache
def registry() -> dict[str, PublishedSet]:
    """All entries, in the order of the file."""
    text = (files("minimind.data") / "registry.toml").read_text("utf-8")
    return {name: PublishedSet(**entry) for name, entry in tomllib.loads(text).items()}


def is_registered(name: str) -> bool:
    """True if the part of `name` before a colon is the name of a set."""
    return name.partition(":")[0] in registry()


def find(name: str) -> Published:
    """Return the file that `NAME` or `NAME:FILE` means. Raises UsageError with what is near."""
    set_name, _, file_name = name.partition(":")
    entry = registry().get(set_name)
    if entry is None:
        raise UsageError(
            f"no data set {set_name!r} is known{_did_you_mean(set_name, registry())}; "
            "`minimind data list` shows them all"
        )
    chosen = file_name or entry.default
    if chosen in entry.files:
        return Published(f"{set_name}:{chosen}", entry, entry.files[chosen])
    if chosen and entry.pattern and not {"..", ""} & set(chosen.split("/")):
        file = PublishedFile(path=entry.pattern.format(name=chosen))
        return Published(f"{set_name}:{chosen}", entry, file)
    known = ", ".join(f"{set_name}:{one}" for one in entry.files)
    if not chosen:
        raise UsageError(f"{set_name} has many parts; name one: {set_name}:PART ({entry.source})")
    raise UsageError(
        f"{set_name} has no file {chosen!r}{_did_you_mean(chosen, entry.files)}; {known}"
    )


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""
