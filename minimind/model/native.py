"""Compiled code: C++ sources of this package, compiled at first use where there is a compiler.

Nobody needs a compiler. Without one, and with `MINIMIND_NATIVE=0`, PyTorch's operations compute the
same quantities, more slowly and with other rounding. Compiling takes seconds, and the libraries are
kept in the cache folder.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from minimind.environment import NATIVE_VARIABLE
from minimind.errors import MinimindError, UsageError
from minimind.paths import cache_folder

_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC")
SCALAR_HEADER = Path(__file__).with_name("scalar.h")  # included by all sources
AMX_HEADER = SCALAR_HEADER.with_name("amx.h")
_SECONDS = 120  # for one call of the compiler


def unavailable_reason() -> str | None:
    """Return why nothing is compiled, whether or not there is a compiler; else None."""
    if os.environ.get(NATIVE_VARIABLE) == "0":
        return f"{NATIVE_VARIABLE}=0"
    if sys.platform != "linux":  # elsewhere PyTorch's OpenMP threads cannot be shared
        return f"not supported on {sys.platform}"
    return None


def compile_library(sources: tuple[Path, ...], flags: tuple[str, ...] = ()) -> ctypes.CDLL | str:
    """Return the library of the first source file, or the reason why there is none.

    sources: the file to compile, then the files that it includes.
    """
    return unavailable_reason() or _load(sources, flags)


@cache
def _load(sources: tuple[Path, ...], flags: tuple[str, ...]) -> ctypes.CDLL | str:
    try:
        if not _compiler():
            return "no C++ compiler; install g++"
        path = _compiled(sources, flags)
        try:
            # PyTorch has loaded an OpenMP library of the same name, so both share its threads.
            return ctypes.CDLL(str(path))
        except OSError:  # damaged, for example by a power failure
            path.unlink()
            return ctypes.CDLL(str(_compiled(sources, flags)))
    except subprocess.CalledProcessError as error:
        return f"{error.cmd[0]} failed: {error.stderr.strip()[:500]}"
    except (OSError, subprocess.TimeoutExpired, MinimindError) as error:
        return str(error)


def _words(variable: str) -> list[str]:
    """Return the words of a variable. Raises UsageError for an unbalanced quote."""
    try:
        return shlex.split(os.environ.get(variable, ""))
    except ValueError as error:
        raise UsageError(f"{variable}: {error}") from None


def _compiler() -> list[str]:
    """Return the command of the C++ compiler, `$CXX` if it is set; empty if there is none."""
    command = _words("CXX")
    names = [command[0]] if command else ["g++", "clang++"]
    found = next((path for name in names if (path := shutil.which(name))), None)
    return [found, *command[1:]] if found else []


def _compiled(sources: Sequence[Path], flags: Sequence[str]) -> Path:
    """Return the path of the library, compiled if it is not in the cache folder."""
    command = [*_compiler(), *_FLAGS, *flags, *_words("CXXFLAGS")]
    version = subprocess.run(
        [command[0], "--version"], capture_output=True, text=True, check=True, timeout=_SECONDS
    ).stdout
    # A cache folder may be shared by several processors, and -march=native depends on them.
    parts = [version, shlex.join(command), _processor()]
    parts += [source.read_text("utf-8") for source in sources]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    library = cache_folder() / "native" / f"{sources[0].stem}-{key}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built = Path(folder) / library.name
            subprocess.run(
                [*command, str(sources[0]), "-o", str(built)],
                capture_output=True,
                text=True,
                check=True,
                timeout=_SECONDS,
            )
            built.replace(library)
    return library


def _processor() -> str:
    """Return the model and the instruction sets of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    names = ("flags", "Features", "model name")
    return "\n".join(sorted({line for line in lines if line.startswith(names)}))
