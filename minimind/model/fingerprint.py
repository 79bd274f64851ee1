"""One fingerprint of a model for everything that depends on its files."""

import hashlib
import json
from pathlib import Path

# Weights, configuration, tokenizer, chat template.
_SUFFIXES = (".json", ".safetensors", ".jinja", ".model", ".txt")


def fingerprint(*directories: Path) -> str:
    """Return the SHA-256 of the names and whole contents of the files of model directories."""
    digest = hashlib.sha256()
    for directory in directories:
        for path in sorted(directory.iterdir()):
            if path.suffix in _SUFFIXES and path.name[0] != "." and path.is_file():
                with path.open("rb") as file:
                    content = hashlib.file_digest(file, "sha256").hexdigest()
                digest.update(json.dumps([path.name, content]).encode())
        digest.update(b"\n")
    return digest.hexdigest()
