"""LoRA adapter to GGUF, for `llama-server --lora FILE` and the ADAPTER line of a Modelfile.

llama.cpp adds alpha / r · B A to a matrix under the matrix's own name. B [out, r] has the rows of
the matrix, so it is permuted and split as the matrix is; A [r, in] is stored unchanged.
"""

from collections.abc import Iterator
from pathlib import Path

import gguf
from torch import Tensor

from minimind.errors import UsageError
from minimind.export.gguf import (
    GGUFReport,
    add_tensor,
    architecture,
    check_new_file,
    gguf_file,
    llama_cpp_tensors,
)
from minimind.model import Transformer, load_model
from minimind.model.adapter import adapter_matrices

ADAPTER_TYPES = ("f32", "f16", "bf16")


def export_gguf_adapter(base: Path, adapter: Path, out: Path, *, type: str = "f16") -> GGUFReport:
    """Write an adapter directory as a new GGUF file, to use with a GGUF of the same base model.

    Raises ModelError for an adapter that is damaged or belongs to another model, UsageError for
    another type than `ADAPTER_TYPES`; otherwise as `export_gguf`.
    """
    type = type.lower()
    if type not in ADAPTER_TYPES:
        raise UsageError(f"adapters are not quantized: use --type {', '.join(ADAPTER_TYPES)}")
    check_new_file(out)
    model = load_model(base)
    tensors = list(_adapter_tensors(model, adapter))
    with gguf_file(out, architecture(model.config)) as writer:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 1.0)
        for name, tensor in tensors:
            add_tensor(writer, name, tensor, type)
    return GGUFReport(out, type, out.stat().st_size)


def _adapter_tensors(model: Transformer, adapter: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the float32 matrices A and B of each module under llama.cpp's names.

    llama.cpp scales by alpha / r with one alpha for all modules, which peft's may differ in. So
    alpha is 1 in the file, and B is multiplied by scale · r.
    """
    for module, a, b, scale in adapter_matrices(model, adapter):
        for name, rows in llama_cpp_tensors(module, b * (scale * len(a)), model.config):
            yield f"{name}.weight.lora_a", a
            yield f"{name}.weight.lora_b", rows
