"""`minimind export onnx MODEL --out DIR`: a model for onnxruntime and transformers.js."""

from minimind.cli import console
from minimind.cli.export import Adapter, OutFolder
from minimind.cli.options import Model


def onnx(
    model: Model,
    out: OutFolder,
    adapter: Adapter = None,
) -> None:
    """Write an ONNX graph for onnxruntime and transformers.js."""
    from minimind.export.onnx import export_onnx
    from minimind.model import resolve_adapter_directory, resolve_model_directory

    directory = resolve_model_directory(model)
    merged = resolve_adapter_directory(adapter) if adapter else None
    with console.console.status("tracing the model; this takes up to a minute"):
        graph = export_onnx(directory, out, adapter=merged)
    console.say(f"{graph}: {graph.stat().st_size / 1e6:,.1f} MB, float32")
    console.say(f"{out} is a model folder of transformers.js; onnxruntime opens the graph itself.")
