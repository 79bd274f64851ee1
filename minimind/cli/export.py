"""`minimind export …`: a trained model in the formats of other programs."""

import contextlib
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minimind.cli import console
from minimind.cli.options import Model
from minimind.errors import UsageError, shell_words

if TYPE_CHECKING:
    from minimind.export.gguf import GGUFReport

app = typer.Typer(help="Export a model to other programs: GGUF, Ollama, a browser page.")

Adapter = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="LoRA adapter, or the run directory that holds one; it is merged."
    ),
]
Type = Annotated[
    str,
    typer.Option(
        help="Number format of the weights: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0; with "
        "llama-cpp-python also q6_k, q5_k_m, q5_k_s, q4_k_m, q4_k_s, q3_k_m, q2_k."
    ),
]
OutFolder = Annotated[Path, typer.Option(metavar="DIR", help="Folder to write.")]


@app.command()
def gguf(
    model: Model,
    type: Type = "f16",
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Default: NAME-TYPE.gguf in the current folder."),
    ] = None,
    adapter: Adapter = None,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="Write the adapter alone, without its base.")
    ] = False,
) -> None:
    """Write a GGUF file for llama.cpp, LM Studio and other programs."""
    from minimind.export.gguf import export_gguf, model_name
    from minimind.export.gguf_adapter import export_gguf_adapter
    from minimind.model import resolve_model_directory

    directory, adapter_directory = resolve_model_directory(model), _resolve(adapter)
    if adapter_only:
        if not adapter_directory:
            raise UsageError("--adapter-only needs --adapter DIR")
        file = out or Path(f"{model_name(adapter_directory)}-lora-{type.lower()}.gguf")
        _show(export_gguf_adapter(directory, adapter_directory, file, type=type))
        base = f"{model_name(directory)}-{type.lower()}.gguf"
        console.say(
            "Run it with the base model in llama.cpp: "
            f"llama-cli {shell_words('-m', base, '--lora', file)}"
        )
        return
    file = out or Path(f"{model_name(directory)}-{type.lower()}.gguf")
    with _progress_bar() as progress:
        report = export_gguf(
            directory, file, type=type, adapter=adapter_directory, progress=progress
        )
    _show(report)
    console.say(f"Run it in llama.cpp: llama-cli {shell_words('-m', file)}")


@app.command()
def ollama(model: Model, out: OutFolder, type: Type = "f16", adapter: Adapter = None) -> None:
    """Write a GGUF file and a Modelfile for Ollama."""
    from minimind.export.gguf import model_name
    from minimind.export.ollama import export_ollama
    from minimind.model import resolve_model_directory

    directory = resolve_model_directory(model)
    # Names of Ollama models are ASCII.
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", model_name(directory)).strip("-.") or "minimind"
    with _progress_bar() as progress:
        report = export_ollama(
            directory, out, name=name, type=type, adapter=_resolve(adapter), progress=progress
        )
    _show(report)
    create = shell_words("ollama", "create", name, "-f", out / "Modelfile")
    console.say(f"Run it in Ollama: {create} && ollama run {name}")


@app.command()
def web(
    model: Model,
    out: OutFolder,
    type: Type = "q8_0",
    adapter: Adapter = None,
    wllama: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="npm package of wllama (.tgz), instead of a download."),
    ] = None,
) -> None:
    """Write a chat page, static files only, that runs the model in the browser."""
    from minimind.export.gguf import model_name
    from minimind.export.web import export_web, holds_page
    from minimind.model import resolve_model_directory

    directory = resolve_model_directory(model)
    replaces = holds_page(out)
    with _progress_bar() as progress:
        report = export_web(
            directory,
            out,
            name=model_name(directory),
            type=type,
            adapter=_resolve(adapter),
            wllama=wllama,
            progress=progress,
        )
    _show(report)
    if replaces:
        console.say(f"The earlier page in {out} was replaced")
    python = "python" if shutil.which("python") else sys.executable
    serve = shell_words(python, "-m", "http.server", "--bind", "127.0.0.1", "-d", out)
    console.say(f"Any static web host can serve this folder. On this machine: {serve}")
    console.say("Then open http://127.0.0.1:8000")


def _resolve(adapter: Path | None) -> Path | None:
    from minimind.model import resolve_adapter_directory

    return resolve_adapter_directory(adapter) if adapter else None


@contextlib.contextmanager
def _progress_bar() -> Iterator[Callable[[int, int], None]]:
    """Yield a function of (tensors done, tensors in all) that draws a progress bar."""
    with console.make_progress("tensor") as bar:
        task = bar.add_task("exporting", total=None, note="")
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _show(report: "GGUFReport") -> None:
    """Print the name and size of what was written, and which tensors have another type."""
    console.say(f"{report.path}: {report.size / 1e6:,.1f} MB, {report.type}")
    if report.other_types:
        count, types = len(report.other_types), sorted(set(report.other_types.values()))
        console.say(
            f"{console.pluralize(count, 'tensor')} could not be stored as {report.type}, which "
            f"needs rows of a multiple of {report.block} numbers, and became {', '.join(types)}"
        )
