"""`minimind export torch` and `minimind import`: `.pth` weights of the public MiniMind project."""

from pathlib import Path
from typing import Annotated

import typer

from minimind.cli import console
from minimind.cli.options import Model


def export_torch(
    model: Model,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Weights to write, such as NAME.pth.")],
) -> None:
    """Write a .pth file that the code of MiniMind v2 or v3 loads."""
    from minimind.export.pth_export import export_pth
    from minimind.model import resolve_model_directory

    config = export_pth(resolve_model_directory(model), out)
    version = "v3" if "head_dim" in config else "v2, before March 2026"
    console.say(f"{out}: {out.stat().st_size / 1e6:,.1f} MB, for MiniMind {version}")
    console.say(f"{out.with_suffix('.json')}: the arguments of its MiniMindConfig")


def import_pth(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Weights of MiniMind v1, v2 or v3.")],
    out: Annotated[Path, typer.Option(help="Model directory to write.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="What the weights do not show: num_attention_heads, max_position_embeddings, "
            "rope_theta, rms_norm_eps, num_experts_per_tok. [default: from a MiniMind "
            "configuration beside FILE, or MiniMind's defaults]",
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Tokenizer directory. [default: the folder of FILE]"),
    ] = None,
) -> None:
    """Convert a .pth file of MiniMind to a model directory.

    Code in the file is never run.
    """
    from minimind.config.load import parse_override
    from minimind.errors import UsageError
    from minimind.export.pth_import import import_pth
    from minimind.tokenizer import Tokenizer

    if not file.is_file():
        raise UsageError(f"{file}: there is no such file; give a .pth file of MiniMind's weights")
    folder = tokenizer or file.parent
    if tokenizer is None and not (folder / "tokenizer.json").is_file():
        raise UsageError(
            f"{folder} has no tokenizer.json; give MiniMind's tokenizer, which is in its "
            "repository in the folder model: --tokenizer DIR"
        )
    report = import_pth(
        file, out, Tokenizer.load(folder), dict(map(parse_override, settings or []))
    )
    console.say(f"{report.generation}: {report.num_parameters:,} parameters in {report.dtype}")
    if report.settings:
        title = "settings that the weights do not show"
        console.show(console.table(title, ["setting", "value", "source"], report.settings))
    console.say(f"The model is in {out}. Try it: {console.command('chat', out)}")
