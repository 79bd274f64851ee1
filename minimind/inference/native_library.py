"""The compiled library of `decode.cpp` and the C structs that it takes.

Without a compiler decoding runs on torch: more slowly, with results that differ by rounding.
"""

import ctypes
from pathlib import Path

import torch

from minimind.model.native import AMX_HEADER, SCALAR_HEADER, compile_library

_FOLDER = Path(__file__).parent
_SOURCES = (_FOLDER / "decode.cpp", _FOLDER / "products.h", AMX_HEADER, SCALAR_HEADER)
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
        ("cache_kind", ctypes.c_int32),
        *(
            (name, ctypes.c_float)
            for name in ("eps", "attention_scale", "residual_scale", "logits_scale")
        ),
    ]


def load_library() -> ctypes.CDLL | None:
    """Return the library, compiled if necessary; None if `unavailable_reason` returns a reason."""
    library = compile_library(_SOURCES)
    return None if isinstance(library, str) else _declared(library)


def unavailable_reason() -> str | None:
    """Return why decoding on a CPU runs on torch, or None."""
    library = compile_library(_SOURCES)
    return library if isinstance(library, str) else None


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the types of the functions' arguments and results."""
    pointer, integer = ctypes.c_void_p, ctypes.c_int32
    library.minimind_panel.restype = integer
    library.minimind_forward.argtypes = [
        *(pointer, integer),
        *[pointer] * 4,
        *(integer, pointer, pointer, integer),
    ]
    return library
