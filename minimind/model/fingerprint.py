"""Fingerprint of a model's files, for caches and results that depend on them."""

import hashlib
import json
from pathlib import Path

# Weights, configuration, tokenizer, chat template.
_SUFFIXES = (".json", ".safetensors", ".jinja", ".model", ".txt")


def fingerprint(*directories: Path) -> str:
    """Return the SHA-256 over names and contents of the model files in `directories`."""
    digest = hashlib.sha256()
    for directory in directories:
        for path in sorted(directory.iterdir()):
            if path.suffix in _SUFFIXES and path.name[0] != "." and path.is_file():
                with path.open("rb") as file:
                    content = hashlib.file_digest(file, "sha256").hexdigest()
                digest.update(json.dumps([path.name, content]).encode())
        digest.update(b"\n")
    return digest.hexdigest()
