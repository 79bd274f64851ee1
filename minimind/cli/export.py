"""`minimind export …`: a trained model in the formats of other programs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minimind.cli import console
from minimind.cli.options import Model
from minimind.errors import shell_words

if TYPE_CHECKING:
    from minimind.export.gguf import GGUFReport

app = typer.Typer(help="Export a model to other programs: GGUF, Ollama, a browser page.")

Adapter = Annotated[
    Path | None, typer.Option(metavar="DIR", help="LoRA adapter or run directory to merge first.")
]
Type = Annotated[
    str,
    typer.Option(
        help="Number format of the weights: f32, f16, bf16, q8_0, q4_0, q4_1, q5_0, q5_1; "
        "with llama-cpp-python also q2_k, q3_k_m, q4_k_s, q4_k_m, q5_k_s, q5_k_m, q6_k."
    ),
]


@app.command()
def gguf(
    model: Model,
    type: Type = "f16",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Default: NAME-TYPE.gguf here.")
    ] = None,
    adapter: Adapter = None,
    adapter_only: Annotated[
        bool, typer.Option(help="Write the adapter alone, for `llama-server --lora`.")
    ] = False,
) -> None:
    """Write a GGUF file for llama.cpp, Ollama, LM Studio and others."""
    from minimind.errors import UsageError
    from minimind.export.gguf import export_gguf
    from minimind.export.gguf_adapter import export_gguf_adapter
    from minimind.model import resolve_adapter_directory, resolve_model_directory

    directory = resolve_model_directory(model)
    if adapter_only:
        if adapter is None:
            raise UsageError("--adapter-only needs --adapter DIR")
        file = out or Path(f"{_name(adapter)}-lora-{type}.gguf")
        report = export_gguf_adapter(directory, resolve_adapter_directory(adapter), file, type=type)
        _show(report)
        return
    merged = resolve_adapter_directory(adapter) if adapter else None
    file = out or Path(f"{_name(model)}-{type}.gguf")
    with console.make_progress("tensor") as progress:
        task = progress.add_task("exporting", total=None, note="")
        report = export_gguf(
            directory,
            file,
            type=type,
            adapter=merged,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    _show(report)
    console.say(f"Run it with llama.cpp: llama-cli {shell_words('-m', file)}")


@app.command()
def ollama(
    model: Model,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write.")],
    type: Type = "f16",
    adapter: Adapter = None,
) -> None:
    """Write a GGUF file and a Modelfile for Ollama."""
    from minimind.export.gguf import export_gguf
    from minimind.export.ollama import export_ollama
    from minimind.model import resolve_adapter_directory, resolve_model_directory

    directory = resolve_model_directory(model)
    merged = resolve_adapter_directory(adapter) if adapter else None
    file = out / f"{_name(model)}-{type}.gguf"
    modelfile = export_ollama(directory, file, out / "Modelfile")
    _show(export_gguf(directory, file, type=type, adapter=merged))
    name = _name(model)
    console.say(f"Run it: ollama create {shell_words(name, '-f', modelfile)} && ollama run {name}")


@app.command()
def web(
    model: Model,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write.")],
    type: Type = "q8_0",
    adapter: Adapter = None,
    wllama: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="npm package of wllama (.tgz), instead of a download."),
    ] = None,
) -> None:
    """Write a folder of static files: a chat page that runs the model in the browser."""
    from minimind.export.web import export_web
    from minimind.model import resolve_adapter_directory, resolve_model_directory

    directory = resolve_model_directory(model)
    merged = resolve_adapter_directory(adapter) if adapter else None
    _show(export_web(directory, out, name=_name(model), type=type, adapter=merged, wllama=wllama))
    console.say(
        f"The page is in {out}; any static host serves it. Here: "
        f"python -m http.server --bind 127.0.0.1 --directory {shell_words(out)}"
    )


def _name(model: Path) -> str:
    """Return a name for files: that of the run or model directory."""
    resolved = model.resolve()
    return (resolved.parent if resolved.name == "model" else resolved).name


def _show(report: "GGUFReport") -> None:
    console.say(f"{report.path}: {report.size / 1e6:,.1f} MB, {report.type}")
    if report.wider:
        console.say(
            f"{len(report.wider):,} tensors are f16: their rows do not fill blocks of 32 numbers"
        )
