"""The Newton-Schulz iteration of Muon in compiled code, on processors with AMX.

`newton_schulz.cpp` computes what `orthogonalize` in `optimizers.py` describes. AMX multiplies bf16
many times faster than other units multiply float32, so that three bf16 numbers in place of each
float32 number, and six products in place of one, are still faster, and as exact.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from minimind.model.native import AMX_HEADER, SCALAR_HEADER, compile_library

_SOURCES = (Path(__file__).with_suffix(".cpp"), AMX_HEADER, SCALAR_HEADER)


def takes(matrices: Tensor) -> bool:
    """Return True if the compiled code takes these matrices: float32 on a CPU with AMX."""
    if matrices.device.type != "cpu" or matrices.dtype != torch.float32:
        return False
    library = compile_library(_SOURCES)
    return not isinstance(library, str) and bool(library.minimind_has_amx())


def orthogonalize(matrices: Tensor, polynomials: Sequence[tuple[float, float, float]]) -> Tensor:
    """Apply polynomials a s + b s³ + c s⁵ to the singular values of each matrix, scaled to [0, 1].

    matrices: [n, rows, columns] float32. polynomials: (a, b, c) each; an even number.
    """
    library = compile_library(_SOURCES)
    assert isinstance(library, ctypes.CDLL) and matrices.dtype == torch.float32
    matrices, threads = matrices.contiguous(), torch.get_num_threads()
    sizes = [ctypes.c_int64(size) for size in matrices.shape]
    library.minimind_scratch_bytes.restype = ctypes.c_int64
    # PyTorch's allocator aligns to 64 bytes.
    scratch = torch.empty(threads * library.minimind_scratch_bytes(*sizes[1:]), dtype=torch.uint8)
    coefficients, out = torch.tensor(polynomials, dtype=torch.float32), torch.empty_like(matrices)
    library.minimind_orthogonalize(
        ctypes.c_void_p(matrices.data_ptr()),
        ctypes.c_void_p(out.data_ptr()),
        *sizes,
        ctypes.c_void_p(coefficients.data_ptr()),
        ctypes.c_int64(len(coefficients)),
        ctypes.c_void_p(scratch.data_ptr()),
        ctypes.c_int64(threads),
    )
    return out
