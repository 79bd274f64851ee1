"""`minimind merge MODEL --adapter DIR --out DIR`: merge a LoRA adapter into its model."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from minimind.cli import console
from minimind.cli.options import Model
from minimind.errors import UsageError


def merge(
    model: Model,
    adapter: Annotated[
        Path, typer.Option(metavar="DIR", help="LoRA adapter, or the run directory that holds one.")
    ],
    out: Annotated[Path, typer.Option(help="Model directory to write.")],
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Data type of the merged weights; default: that of MODEL."),
    ] = None,
) -> None:
    """Merge a LoRA adapter into its model. The weights are added in float32."""
    import torch

    from minimind.inference.load import load_for_inference
    from minimind.model import resolve_model_directory, save_model
    from minimind.model.directory import stored_dtype
    from minimind.model.saving import check_new_directory

    if out.resolve() == resolve_model_directory(model).resolve():
        raise UsageError(f"{out} is the base model of the adapter; choose another --out")
    check_new_directory(out)
    merged, tokenizer = load_for_inference(model, "cpu", adapter=adapter, dtype=torch.float32)
    save_model(out, merged, tokenizer, dtype=dtype or stored_dtype(resolve_model_directory(model)))
    console.say(f"The merged model is in {out}. Try it: {console.command('chat', out)}")
