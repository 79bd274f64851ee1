"""LoRA adapter to GGUF, for `llama-server --lora FILE` and the ADAPTER line of a Modelfile.

llama.cpp adds (alpha / r) B A to a matrix under the matrix's own name. B [out, r] has the rows of
the matrix, so it is permuted and split as the matrix is; A [r, in] stays.
"""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from minimind.errors import UsageError
from minimind.export.gguf import GGUFReport, architecture, convert, finish, gguf_package, new_writer
from minimind.model import Transformer, load_model
from minimind.model.adapter import adapter_matrices

ADAPTER_TYPES = ("f32", "f16", "bf16")


def export_gguf_adapter(base: Path, adapter: Path, out: Path, *, type: str = "f16") -> GGUFReport:
    """Write an adapter directory as a GGUF file that goes with a GGUF of the same base model.

    Raises ModelError for an adapter that is broken or was made for another model, UsageError for
    another type than "f32", "f16" and "bf16".
    """
    if type not in ADAPTER_TYPES:
        raise UsageError(f"an adapter is not quantized: give --type {', '.join(ADAPTER_TYPES)}")
    gguf = gguf_package()
    model = load_model(base)
    tensors = dict(_tensors(model, adapter))
    writer = new_writer(out, architecture(model.config))
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 1.0)
    kind = gguf.GGMLQuantizationType[type.upper()]
    for name, tensor in tensors.items():
        array = tensor.detach().float().contiguous().numpy()
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    finish(writer, out)
    return GGUFReport(out, out.stat().st_size, type)


def _tensors(model: Transformer, adapter: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield both matrices of each module. llama.cpp multiplies by alpha / r, alpha = 1 here.

    The scale goes into B, since that of GGUF is one for all modules and peft's is not.
    """
    for module, a, b, scale in adapter_matrices(model, adapter):
        for name, rows in convert(module, b * (scale * len(a)), model.config):
            yield f"{name}.weight.lora_a", a
            yield f"{name}.weight.lora_b", rows
