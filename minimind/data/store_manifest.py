"""Manifest of a token store: its inputs and counts. It is written last."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from minimind.data.encode import Kind
from minimind.files import write_atomically

FORMAT_VERSION = 6
MANIFEST = "manifest.json"
Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
# Variables that a recipe is expected to set; other {{variables}} may be code.
IDENTITY_VARIABLES = ("name", "author")
_MAX_UNSUBSTITUTED = 5


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest of the store in `folder` atomically."""
    write_atomically(folder / MANIFEST, json.dumps(manifest, ensure_ascii=False, indent=1))


def invalid_records_file(folder: Path) -> Path:
    """Return the file with the quarantined records of the store in `folder`."""
    return folder.with_name(f"{folder.name}.invalid.jsonl")


def unsubstituted(
    occurrences: "Counter[str]", kind: Kind, variables: Mapping[str, str]
) -> dict[str, int]:
    """Return the number of records with each template variable that was not substituted.

    occurrences: number of records with each variable. The identity variables come first, then the
    most frequent others. Others are listed only for conversations and only if `variables` are set:
    elsewhere they are probably code.
    """
    list_others = bool(variables) and kind != "text"
    names = [name for name, _ in occurrences.most_common() if name not in variables]
    names = [name for name in names if list_others or name in IDENTITY_VARIABLES]
    first = sorted(names, key=lambda name: name not in IDENTITY_VARIABLES)[:_MAX_UNSUBSTITUTED]
    return {name: occurrences[name] for name in first}
