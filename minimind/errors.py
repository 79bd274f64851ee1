"""What can go wrong for a user, as one tree.

    MinimindError
    ├── UsageError          a command line that does not fit together
    ├── ConfigError         a recipe or a setting: unknown key, wrong value, contradiction
    ├── DataError           input files: missing, unreadable, unrecognised, too many bad lines
    ├── TokenizerError      a tokenizer directory that is broken or does not fit the model
    ├── ModelError          a model directory that is not one, or whose tensors do not fit
    ├── CheckpointError     no valid checkpoint, or one of another run
    ├── ResourceError       disk, memory or device: what is missing and what would do
    ├── ServiceError        a service that is not there, refuses, or breaks off
    └── TrainingError       training cannot go on: bad numbers, empty supervision, a locked run

Each message says what happened, in which file, key or line, and what to do next.
The command line prints the message alone and exits with status 1; a traceback means a bug of ours.
"""

import shlex
import subprocess
import sys
from pathlib import Path


class MinimindError(Exception):
    """Base of every error that a user can cause or mend."""


class UsageError(MinimindError):
    """A command line whose parts do not fit together."""


class ConfigError(MinimindError):
    """A recipe or a setting that is unknown, of the wrong kind, or contradicts another."""


class DataError(MinimindError):
    """An input file that is missing, unreadable, unrecognised, or has too many bad lines."""


class TokenizerError(MinimindError):
    """A tokenizer directory that is broken, or that does not fit the model."""


class ModelError(MinimindError):
    """A model directory that is not one, or whose tensors do not fit its configuration."""


class CheckpointError(MinimindError):
    """No valid checkpoint to go on from, or one that belongs to another run."""


class ResourceError(MinimindError):
    """Too little disk or memory, or a device that is not there."""


class ServiceError(MinimindError):
    """A service that cannot be reached, refuses what is asked, or breaks off."""


class TrainingError(MinimindError):
    """Training that cannot go on: bad numbers, nothing to learn from, a run in use."""


def shell_words(*words: str | Path) -> str:
    """Words of a suggested command, quoted so that they can be pasted into a shell."""
    # A path that begins with a dash would be read as an option.
    safe = [f"./{w}" if isinstance(w, Path) and str(w).startswith("-") else str(w) for w in words]
    return subprocess.list2cmdline(safe) if sys.platform == "win32" else shlex.join(safe)


def install_line(extra: str, package: Path = Path(__file__).parent) -> str:
    """The command that installs an extra of this project, for a checkout or a wheel.

    Double quotes: cmd.exe knows no others.
    """
    if (package.parent / "constraints.txt").is_file():
        return f'pip install -c constraints.txt -e ".[{extra}]"'
    return f'pip install "minimind[{extra}]"'


def is_out_of_memory(error: BaseException) -> bool:
    """Torch tells it by a class of its own where it is its allocator on a GPU that fails; by words
    alone on CPUs, on Apple's, and where CUDA, cuBLAS or NCCL below it find no room."""
    words = ("DefaultCPUAllocator", "not enough memory", "out of memory", "_ALLOC_FAILED")
    return type(error).__name__ == "OutOfMemoryError" or any(w in str(error) for w in words)
