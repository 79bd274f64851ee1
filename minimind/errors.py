"""Exceptions for errors that a user can cause or fix.

    MinimindError
    ├── UsageError          contradictory command-line arguments
    ├── ConfigError         a recipe or a setting: unknown key, invalid value, contradiction
    ├── DataError           input files: missing, unreadable, unrecognised, too many invalid lines
    ├── TokenizerError      a damaged tokenizer directory, or one that does not fit the model
    ├── ModelError          a directory that holds no model, or tensors that do not fit
    ├── CheckpointError     no valid checkpoint, or a checkpoint of another run
    ├── ResourceError       too little disk or memory, or a missing device
    ├── ServiceError        a service that is unreachable, refuses a request or disconnects
    │   └── RejectedRequestError  the service would reject the same request again
    └── TrainingError       non-finite values, no supervised tokens, a run locked by another process

Each message says what happened, in which file, key or line, and what to do next. The command line
prints the message and exits with status 1. A traceback means a bug in minimind.
"""

import errno
import os
import shlex
import subprocess
import sys
from pathlib import Path


class MinimindError(Exception):
    """Base class of all errors that a user can cause or fix."""


class UsageError(MinimindError):
    """Command-line arguments that contradict each other."""


class ConfigError(MinimindError):
    """A setting that is unknown, has an invalid value or contradicts another."""


class DataError(MinimindError):
    """An input file that is missing, unreadable, unrecognised or has too many invalid lines."""


class TokenizerError(MinimindError):
    """A tokenizer directory that is damaged or does not fit the model."""


class ModelError(MinimindError):
    """A directory that holds no model, or tensors that do not fit their configuration."""


class CheckpointError(MinimindError):
    """No valid checkpoint to resume from, or a checkpoint of another run."""


class ResourceError(MinimindError):
    """Too little disk or memory, or a missing device."""


class ServiceError(MinimindError):
    """A service that is unreachable, refuses a request or disconnects."""


class RejectedRequestError(ServiceError):
    """A request that a service rejects for its content, such as a prompt that is too long."""


class TrainingError(MinimindError):
    """Training cannot continue: non-finite values, no supervised tokens, a locked run."""


def shell_words(*words: str | Path) -> str:
    """Join arguments into a shell command, quoted so that it can be pasted."""
    # A path that begins with a dash would be parsed as an option.
    safe = [f"./{w}" if isinstance(w, Path) and str(w).startswith("-") else str(w) for w in words]
    return subprocess.list2cmdline(safe) if sys.platform == "win32" else shlex.join(safe)


def same_command() -> str:
    """Return how messages name the command to repeat: with --fresh, it would start over."""
    return "the same command" + " without --fresh" * ("--fresh" in sys.argv)


def reason_of(error: OSError) -> str:
    """Return why a path cannot be used; names the file that is there instead of a folder."""
    if error.filename and isinstance(error, FileExistsError | NotADirectoryError):
        path = Path(os.fsdecode(error.filename))
        for obstacle in (path, *path.parents):
            if obstacle.is_file():
                return f"{obstacle} is a file, not a folder"
    return error.strerror or str(error)


def unwritable(out: Path, error: Exception) -> ResourceError:
    """Return the error for an output that cannot be written, with advice that fits the cause."""
    if isinstance(error, OSError) and error.strerror is not None:
        reason = reason_of(error)
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    else:  # numpy and torch report a full disk without its error number
        reason, is_full = f"incomplete write ({error})", True
    advice = "free some disk space, or choose another --out" if is_full else "choose another --out"
    return ResourceError(f"{out}: cannot be written: {reason}; {advice}")


def install_line(extra: str, package: Path = Path(__file__).parent) -> str:
    """Return the command that installs an extra of this package, in a checkout or from a wheel."""
    # Double quotes: cmd.exe has no others.
    if (package.parent / "constraints.txt").is_file():
        return f'pip install -c constraints.txt -e ".[{extra}]"'
    return f'pip install "minimind[{extra}]"'


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if `error` means that a PyTorch operation ran out of memory.

    Only PyTorch's GPU allocator raises `OutOfMemoryError`. Errors of the CPU and the Apple GPU, and
    of CUDA, cuBLAS and NCCL, are recognized by their message.
    """
    messages = ("DefaultCPUAllocator", "not enough memory", "out of memory", "_ALLOC_FAILED")
    by_message = any(message in str(error) for message in messages)
    return type(error).__name__ == "OutOfMemoryError" or by_message
