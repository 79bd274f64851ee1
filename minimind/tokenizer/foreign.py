"""Third-party tokenizers: their files, kept unchanged, and the values read from them."""

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
# Files of a tokenizer. The last contains the EOS ids, which belong to the chat format.
_FILES = (
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
_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
_ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class ForeignFiles:
    """The files of a third-party tokenizer. contents: by file name."""

    directory: Path
    contents: Mapping[str, bytes]
    config: Mapping[str, Any]
    model_ids: Mapping[str, Any]  # the values of _ID_KEYS in the model's config.json

    @classmethod
    def read(cls, directory: Path) -> "ForeignFiles":
        """Read the files in `directory`. Raises TokenizerError when a file cannot be read."""
        try:
            contents = {
                name: (directory / name).read_bytes()
                for name in _FILES
                if (directory / name).is_file()
            }
        except OSError as error:
            raise TokenizerError(f"{directory}: cannot be read: {error.strerror}") from error
        model_config = directory / "config.json"
        raw = read_json(model_config, model_config.read_bytes()) if model_config.is_file() else {}
        config = read_json(
            directory / "tokenizer_config.json", contents.get("tokenizer_config.json", b"{}")
        )
        return cls(directory, contents, config, {key: raw[key] for key in _ID_KEYS if key in raw})

    def write(self, directory: Path, *, with_generation_config: bool) -> None:
        """Write every file unchanged. Raises OSError."""
        for name, content in self.contents.items():
            if with_generation_config or name != _GENERATION:
                (directory / name).write_bytes(content)

    @cached_property
    def sha256(self) -> str:
        """Hash of all files that affect ids: equal hashes give equal ids."""
        digest = hashlib.sha256()
        for name, content in sorted(self.contents.items()):
            if name != _GENERATION:
                digest.update(f"{name} {len(content)}\n".encode() + content)
        return digest.hexdigest()

    @cached_property
    def template(self) -> str | None:
        """Chat template, from the same files as in transformers."""
        if _TEMPLATE in self.contents:
            try:
                return self.contents[_TEMPLATE].decode("utf-8")
            except UnicodeDecodeError as error:
                raise TokenizerError(f"{self.directory / _TEMPLATE}: is not UTF-8 text") from error
        template = self.config.get("chat_template")
        if isinstance(template, list):  # several, by name
            by_name = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
            template = by_name.get("default")
        if template is not None and not isinstance(template, str):
            raise TokenizerError(
                f"{self.directory / 'tokenizer_config.json'}: chat_template is not text"
            )
        return template

    @cached_property
    def token_names(self) -> dict[str, str]:
        """Text of `bos_token`, `eos_token` and similar control tokens."""
        path = self.directory / "special_tokens_map.json"
        merged = read_json(path, self.contents.get(path.name, b"{}")) | dict(self.config)
        values = {name: merged.get(name) for name in _TOKEN_NAMES}
        values = {n: v.get("content") if isinstance(v, dict) else v for n, v in values.items()}
        return {name: value for name, value in values.items() if isinstance(value, str)}

    @cached_property
    def eos_ids(self) -> list[int]:
        """`eos_token_id` of generation_config.json and config.json."""
        path = self.directory / _GENERATION
        generation = read_json(path, self.contents.get(path.name, b"{}"))
        ids: list[int] = []
        for file, value in (
            (path, generation.get("eos_token_id")),
            (self.directory / "config.json", self.model_ids.get("eos_token_id")),
        ):
            values = value if isinstance(value, list) else [] if value is None else [value]
            if not all(type(i) is int and i >= 0 for i in values):
                raise TokenizerError(f"{file}: eos_token_id must be an id or a list of ids")
            ids += values
        return ids

    @property
    def missing_files(self) -> str:
        """End of an error message that names the missing files that would define EOS."""
        names = [n for n in ("tokenizer_config.json", _GENERATION) if n not in self.contents]
        verb = "are" if len(names) > 1 else "is"
        return f"; {' and '.join(names)} {verb} missing here: copy them too" if names else ""


def read_json(path: Path, content: bytes) -> dict[str, Any]:
    """Parse the JSON object in `content`. Raises TokenizerError that names the file `path`."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: is not JSON ({error}); copy it again") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: is not a JSON object; copy it again")
    return value
