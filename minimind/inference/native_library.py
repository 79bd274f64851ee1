"""Compilation of `decode.cpp`, where there is a C++ compiler.

The library is compiled at first use, in a few seconds, and kept in the cache folder. Without it
decoding runs on torch: more slowly, with results that differ by rounding.
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
from functools import cache
from pathlib import Path
from typing import Any

import torch

from minimind.environment import NATIVE_VARIABLE
from minimind.errors import MinimindError
from minimind.paths import cache_folder

_SOURCES = [Path(__file__).with_name(name) for name in ("decode.cpp", "products.h")]
# No -ffast-math: it would let a compiler reorder the sums.
_FLAGS = ["-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC"]
_COMPILE_SECONDS = 120
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


class Matrix(ctypes.Structure):
    """`Matrix` of decode.cpp."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("kind", "outputs", "inputs", "panels")),
    ]


class FeedForward(ctypes.Structure):
    """`FeedForward` of decode.cpp."""

    _fields_ = [("gate_up", Matrix), ("down", Matrix)]


class Layer(ctypes.Structure):
    """`Layer` of decode.cpp."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("input_norm", "q_norm", "k_norm", "feed_forward_norm")
        ),
        ("qkv", Matrix),
        ("out", Matrix),
        ("dense", FeedForward),
        ("router", Matrix),
        ("experts", ctypes.POINTER(FeedForward)),
    ]


class Model(ctypes.Structure):
    """`Model` of decode.cpp."""

    _fields_ = [
        ("layers", ctypes.POINTER(Layer)),
        ("final_norm", ctypes.c_void_p),
        ("head", Matrix),
        ("cache", ctypes.c_void_p),
        *(
            (name, ctypes.c_int32)
            for name in ("num_layers", "hidden", "heads", "kv_heads", "head_dim", "slots")
        ),
        *((name, ctypes.c_int32) for name in ("positions", "num_experts", "num_chosen")),
        *(
            (name, ctypes.c_float)
            for name in ("eps", "attention_scale", "residual_scale", "logits_scale")
        ),
    ]


def load_library() -> ctypes.CDLL | None:
    """Return the library, compiled if necessary; None if `unavailable_reason` returns a reason."""
    return None if unavailable_reason() else _library()[0]


def unavailable_reason() -> str | None:
    """Return why decoding on a CPU runs on torch, or None."""
    if os.environ.get(NATIVE_VARIABLE) == "0":
        return f"{NATIVE_VARIABLE}=0"
    return _library()[1]


@cache
def _library() -> tuple[Any, str | None]:
    """Return (library, None) or (None, the reason why there is none)."""
    if sys.platform != "linux":  # elsewhere torch's OpenMP cannot be shared
        return None, f"not tried on {sys.platform}"
    compiler = (
        shlex.split(os.environ.get("CXX", ""))
        or [path for name in ("g++", "clang++") if (path := shutil.which(name))][:1]
    )
    if not compiler:
        return None, "no C++ compiler"
    try:
        library = ctypes.CDLL(str(_compiled(compiler)))
    except subprocess.CalledProcessError as error:
        return None, f"{compiler[0]} failed: {error.stderr.strip()[:500]}"
    except (OSError, subprocess.TimeoutExpired, MinimindError) as error:
        return None, str(error)
    pointer, integer = ctypes.c_void_p, ctypes.c_int32
    library.minimind_panel.restype = integer
    library.minimind_multiply.argtypes = [pointer, integer, pointer, pointer, integer]
    library.minimind_decode.argtypes = [pointer, integer, *[pointer] * 5, integer]
    return library, None


def _compiled(compiler: list[str]) -> Path:
    """Return the library's path; one file per source, compiler, flags and processor."""
    command = [*compiler, *_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    version = subprocess.run(
        [*compiler, "--version"], capture_output=True, text=True, check=True
    ).stdout.encode()
    identity = [
        *(source.read_bytes() for source in _SOURCES),
        shlex.join(command).encode(),
        version,
        _processor(),
    ]
    key = hashlib.sha256(b"\0".join(identity)).hexdigest()[:16]
    path = cache_folder() / "native" / f"decode-{key}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            target = Path(folder) / path.name
            subprocess.run(
                [*command, str(_SOURCES[0]), "-o", str(target)],
                check=True,
                capture_output=True,
                text=True,
                timeout=_COMPILE_SECONDS,
            )
            target.replace(path)
    return path


def _processor() -> bytes:
    """Return what -march=native depends on: a home folder may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor().encode()
    names = ("flags", "Features", "model name")
    return "\n".join(sorted({line for line in lines if line.startswith(names)})).encode()
