"""The Newton-Schulz iteration of Muon in compiled code, on processors with AMX.

`newton_schulz.cpp` computes what `orthogonalize` in `optimizers.py` describes, several times faster
and with 16 instead of 24 bits of mantissa.
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


def orthogonalize_(
    matrices: Sequence[Tensor], polynomials: Sequence[tuple[float, float, float]]
) -> None:
    """Orthogonalize matrices of one shape [rows, columns] in place; they must be contiguous."""
    library = compile_library(_SOURCES)
    assert isinstance(library, ctypes.CDLL) and all(x.is_contiguous() for x in matrices)
    shape = [ctypes.c_int64(size) for size in matrices[0].shape]
    library.minimind_scratch_bytes.restype = ctypes.c_int64
    scratch_bytes = library.minimind_scratch_bytes(*shape)
    # PyTorch's allocator aligns to 64 bytes, and to huge pages where they are enabled.
    scratch = torch.empty(torch.get_num_threads() * scratch_bytes, dtype=torch.uint8)
    pointers = torch.tensor([matrix.data_ptr() for matrix in matrices])
    coefficients = torch.tensor(polynomials, dtype=torch.float32)
    library.minimind_orthogonalize(
        ctypes.c_void_p(pointers.data_ptr()),
        ctypes.c_int64(len(matrices)),
        *shape,
        ctypes.c_void_p(coefficients.data_ptr()),
        ctypes.c_int64(len(coefficients)),
        ctypes.c_void_p(scratch.data_ptr()),
    )
