"""Write model directories atomically, in the layout that transformers, vLLM and llama.cpp read."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from minimind.errors import ModelError, ResourceError, UsageError
from minimind.files import fsync
from minimind.model.hf_config import to_config_json
from minimind.model.transformer import Transformer

_CURRENT = "is the current folder, which cannot be replaced"
_WORTHLESS = re.compile(r"\.DS_Store|\._.*|\.nfs.*|Thumbs\.db|desktop\.ini", re.IGNORECASE)


class SaveableTokenizer(Protocol):
    """The part of a tokenizer that `save_model` uses."""

    @property
    def stop_ids(self) -> tuple[int, ...]: ...
    @property
    def end_of_text(self) -> int: ...
    @property
    def model_ids(self) -> dict[str, Any]: ...
    def save(self, directory: Path) -> None: ...


def save_model(
    directory: Path, model: Transformer, tokenizer: SaveableTokenizer, *, dtype: str = "float32"
) -> None:
    """Write a model directory atomically, replacing a model that is already there.

    Raises ResourceError when it cannot be written, ModelError when `directory` holds something
    else or is the current folder.
    """
    size = sum(p.numel() for p in model.parameters()) * getattr(torch, dtype).itemsize
    with atomic_directory(directory, "model", "config.json", size) as work:
        tensors = {
            name: tensor.detach().to("cpu", getattr(torch, dtype)).contiguous()
            for name, tensor in model.state_dict().items()
        }
        save_file(tensors, work / "model.safetensors", metadata={"format": "pt"})
        config = to_config_json(model.config, dtype) | tokenizer.model_ids
        write_hf_json(work / "config.json", config)
        write_hf_json(
            work / "generation_config.json",
            {
                "do_sample": True,
                "temperature": 0.7,
                "top_p": 0.9,
                "eos_token_id": list(tokenizer.stop_ids),
                "pad_token_id": tokenizer.end_of_text,
            },
        )
        tokenizer.save(work)


@contextlib.contextmanager
def atomic_directory(directory: Path, kind: str, marker: str, size: int) -> Iterator[Path]:
    """Yield a temporary directory that is renamed to `directory` when the block succeeds.

    All files are flushed to the disk before the rename. On an error nothing changes. An existing
    directory is replaced if it is empty or contains the file `marker`, which every directory of
    this `kind` has. Raises ModelError when `directory` holds something else or is the current
    folder, and ResourceError when it cannot be written. size: the bytes needed, for the error
    message.
    """
    if _is_current(directory):  # it would be removed under the process and its shell
        raise ModelError(f"{directory} {_CURRENT}; give another directory")
    is_replaceable = directory.is_dir() and ((directory / marker).is_file() or is_empty(directory))
    if directory.is_file() or (directory.is_dir() and not is_replaceable):
        raise ModelError(f"{directory} already exists and is not a {kind}; give another directory")
    target = directory.resolve()  # a symbolic link stays, and ".." has a name
    # Fixed names, so that the next save finds and removes what a killed process left behind.
    work, old = (target.with_name(f".{target.name}.{part}") for part in ("new", "old"))
    try:
        _restore_or_remove(old, target)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        yield work
        for file in work.rglob("*"):
            fsync(file)
        fsync(work)
        if target.exists():
            os.replace(target, old)
        os.replace(work, target)
        fsync(target.parent)
    except (OSError, SafetensorError) as error:
        raise ResourceError(
            f"{directory}: the {kind} could not be written ({error}); it needs {size:,} bytes"
            + _free_space(directory)
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
        _restore_or_remove(old, target)


def check_new_directory(out: Path) -> None:
    """Raise UsageError unless `out` is missing, or an empty directory but not the current one."""
    if _is_current(out):
        raise UsageError(f"{out} {_CURRENT}; give another --out")
    if out.exists() and not (out.is_dir() and is_empty(out)):
        raise UsageError(
            f"{out} already exists and would be overwritten; give another --out, or move it away "
            "first"
        )


def _is_current(directory: Path) -> bool:
    return directory.is_dir() and directory.samefile(".")


def _restore_or_remove(old: Path, directory: Path) -> None:
    """Remove the replaced directory, or move it back if its replacement is missing."""
    if directory.exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        os.replace(old, directory)


def _free_space(directory: Path) -> str:
    parent = next((path for path in directory.absolute().parents if path.is_dir()), None)
    return f", and {shutil.disk_usage(parent).free:,} are free" if parent else ""


def write_hf_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, indented as in Hugging Face's, with non-ASCII characters unescaped."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def is_stray(name: str) -> bool:
    """Return True for files of file managers and network disks: .DS_Store, .nfs…, Thumbs.db."""
    return name.startswith(".") or name.lower() in ("thumbs.db", "desktop.ini")


def is_empty(directory: Path) -> bool:
    """Return True if a directory contains nothing but files of file managers and network disks.

    Stricter than `is_stray`, because the directory may be removed: a hidden file is the user's.
    """
    return all(file.is_file() and _WORTHLESS.fullmatch(file.name) for file in directory.iterdir())
