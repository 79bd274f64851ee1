"""Tokenizers that were made elsewhere: their files, kept as they are, and what these say."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from minimind.errors import TokenizerError

_TEMPLATE = "chat_template.jinja"
_GENERATION = "generation_config.json"
# What a tokenizer may consist of. The last one says where answers end, which belongs to it.
_KEPT = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    _TEMPLATE,
    _GENERATION,
)
_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class ForeignFiles:
    """The files of a tokenizer made elsewhere, by name."""

    directory: Path
    contents: Mapping[str, bytes]
    config: Mapping[str, Any]
    model_ids: Mapping[str, Any]  # what the model's config.json says of _IDS

    @classmethod
    def read(cls, directory: Path) -> "ForeignFiles":
        """Raises TokenizerError when a file cannot be read."""
        try:
            contents = {
                name: (directory / name).read_bytes()
                for name in _KEPT
                if (directory / name).is_file()
            }
        except OSError as error:
            raise TokenizerError(f"{directory}: cannot be read: {error.strerror}") from error
        model = directory / "config.json"
        raw = read_json(model, model.read_bytes()) if model.is_file() else {}
        config = read_json(
            directory / "tokenizer_config.json", contents.get("tokenizer_config.json", b"{}")
        )
        return cls(directory, contents, config, {key: raw[key] for key in _IDS if key in raw})

    def write(self, directory: Path, *, chats: bool) -> None:
        """Every file as it was; without `chats` not what says where answers end. Raises OSError."""
        for name, content in self.contents.items():
            if chats or name != _GENERATION:
                (directory / name).write_bytes(content)

    @cached_property
    def sha256(self) -> str:
        """Of all that decides about ids: equal sums give equal ids."""
        total = hashlib.sha256()
        for name, content in sorted(self.contents.items()):
            if name != _GENERATION:
                total.update(f"{name} {len(content)}\n".encode() + content)
        return total.hexdigest()

    @cached_property
    def template(self) -> str | None:
        """The chat template, in whichever of the places where transformers looks for it."""
        if _TEMPLATE in self.contents:
            return self._text(_TEMPLATE)
        found = self.config.get("chat_template")
        if isinstance(found, list):  # several by name
            by_name = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
            found = by_name.get("default")
        if found is not None and not isinstance(found, str):
            raise TokenizerError(
                f"{self.directory / 'tokenizer_config.json'}: chat_template is no text"
            )
        return found

    @cached_property
    def names(self) -> dict[str, str]:
        """`bos_token` and its like: how each is written."""
        path = self.directory / "special_tokens_map.json"
        listed = read_json(path, self.contents.get(path.name, b"{}")) | dict(self.config)
        written = {name: listed.get(name) for name in _NAMES}
        written = {n: v.get("content") if isinstance(v, dict) else v for n, v in written.items()}
        return {name: value for name, value in written.items() if isinstance(value, str)}

    @cached_property
    def ends(self) -> list[int]:
        """Ids at which the model stops, as generation_config.json and config.json say."""
        path = self.directory / _GENERATION
        generation = read_json(path, self.contents.get(path.name, b"{}"))
        ids: list[int] = []
        for where, found in (
            (path, generation.get("eos_token_id")),
            (self.directory / "config.json", self.model_ids.get("eos_token_id")),
        ):
            listed = found if isinstance(found, list) else [] if found is None else [found]
            if not all(type(i) is int and i >= 0 for i in listed):
                raise TokenizerError(f"{where}: eos_token_id is neither an id nor a list of ids")
            ids += listed
        return ids

    @property
    def missing(self) -> str:
        """For the end of a message: which files that say where texts end are not there."""
        names = [n for n in ("tokenizer_config.json", _GENERATION) if n not in self.contents]
        verb = "are" if len(names) > 1 else "is"
        return f"; {' and '.join(names)} {verb} missing here: copy them too" if names else ""

    def _text(self, name: str) -> str:
        try:
            return self.contents[name].decode("utf-8")
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{self.directory / name}: is not UTF-8 text") from error


def read_json(path: Path, content: bytes) -> dict[str, Any]:
    """The JSON object that `content`, of the file `path`, holds. Raises TokenizerError."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: is not JSON ({error}); copy it again") from error
    if not isinstance(found, dict):
        raise TokenizerError(f"{path}: is not a JSON object; copy it again")
    return found
