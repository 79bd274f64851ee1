"""`minimind pretrain`, `sft`, `lora` and `dpo`, and the general `minimind train RECIPE`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minimind.cli import console, launcher
from minimind.cli.downloads import Yes, ensure_downloaded
from minimind.cli.options import DEVICE_HELP, Json, Tokenizer
from minimind.errors import UsageError, same_command
from minimind.files import write_json

if TYPE_CHECKING:
    from minimind.config import ResolvedRecipe
    from minimind.config.settings import Recipe
    from minimind.training.stage import StageResult

Arguments = Annotated[
    list[str] | None,
    typer.Argument(metavar="RECIPE KEY=VALUE", help="A recipe, and settings to override."),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        metavar="DATA",
        help="File, folder, quoted glob or dataset name, optionally with @WEIGHT; repeatable.",
    ),
]
Out = Annotated[str | None, typer.Option(help="Run directory.")]
Device = Annotated[str | None, typer.Option(help=DEVICE_HELP)]
Fresh = Annotated[bool, typer.Option("--fresh", help="Discard the previous run.")]
Resume = Annotated[bool, typer.Option("--resume", help="Resume a run; an error if there is none.")]
Explain = Annotated[
    bool, typer.Option("--explain", help="Show each setting and its origin, and exit.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Prepare data and model, report the plan, and exit.")
]
Nproc = Annotated[
    int | None,
    typer.Option("--nproc", min=1, help="Number of data-parallel processes on this machine."),
]


def pretrain(
    arguments: Arguments = None,
    data: Data = None,
    tokenizer: Tokenizer = None,
    out: Out = None,
    device: Device = None,
    nproc: Nproc = None,
    fresh: Fresh = False,
    resume: Resume = False,
    explain: Explain = False,
    dry_run: DryRun = False,
    yes: Yes = False,
    json: Json = None,
) -> None:
    """Pretrain a new model on plain text."""
    flags = {"objective": "pretrain", "data.sources": data, "tokenizer": tokenizer}
    flags |= {"out": out, "device": device}
    _run_command(
        arguments, "pretrain-small", flags, nproc, fresh, resume, explain, dry_run, yes, json
    )


def sft(
    arguments: Arguments = None,
    model: Annotated[str | None, typer.Option(help="Model or run directory to start from.")] = None,
    data: Data = None,
    out: Out = None,
    device: Device = None,
    nproc: Nproc = None,
    fresh: Fresh = False,
    resume: Resume = False,
    explain: Explain = False,
    dry_run: DryRun = False,
    yes: Yes = False,
    json: Json = None,
) -> None:
    """Fine-tune a model on conversations (SFT)."""
    flags = {"objective": "sft", "data.sources": data, "model.init": model}
    flags |= {"out": out, "device": device}
    _run_command(arguments, "sft-small", flags, nproc, fresh, resume, explain, dry_run, yes, json)


def lora(
    arguments: Arguments = None,
    model: Annotated[str | None, typer.Option(help="Model or run directory to adapt.")] = None,
    data: Data = None,
    out: Out = None,
    device: Device = None,
    nproc: Nproc = None,
    fresh: Fresh = False,
    resume: Resume = False,
    explain: Explain = False,
    dry_run: DryRun = False,
    yes: Yes = False,
    json: Json = None,
) -> None:
    """Train a LoRA adapter; the weights of the model stay frozen."""
    flags = {"data.sources": data, "model.init": model, "out": out, "device": device}
    if resolve(arguments or [], "lora-small", flags).recipe.lora is None:
        raise UsageError(
            "the recipe trains the full model; use one with a [lora] table, such as lora-small, "
            "or set lora.rank=8"
        )
    _run_command(arguments, "lora-small", flags, nproc, fresh, resume, explain, dry_run, yes, json)


def dpo(
    arguments: Arguments = None,
    model: Annotated[str | None, typer.Option(help="Model or run directory to start from.")] = None,
    data: Data = None,
    out: Out = None,
    device: Device = None,
    nproc: Nproc = None,
    fresh: Fresh = False,
    resume: Resume = False,
    explain: Explain = False,
    dry_run: DryRun = False,
    yes: Yes = False,
    json: Json = None,
) -> None:
    """Train a chat model on preference pairs (DPO)."""
    flags = {"objective": "dpo", "data.sources": data, "model.init": model}
    flags |= {"out": out, "device": device}
    _run_command(arguments, "dpo-small", flags, nproc, fresh, resume, explain, dry_run, yes, json)


def train(
    arguments: Arguments = None,
    out: Out = None,
    device: Device = None,
    nproc: Nproc = None,
    fresh: Fresh = False,
    resume: Resume = False,
    explain: Explain = False,
    dry_run: DryRun = False,
    yes: Yes = False,
    json: Json = None,
) -> None:
    """Train the stage that a recipe describes."""
    flags = {"out": out, "device": device}
    _run_command(arguments, None, flags, nproc, fresh, resume, explain, dry_run, yes, json)


def _run_command(
    arguments: list[str] | None,
    default_recipe: str | None,
    flags: dict[str, Any],
    nproc: int | None,
    fresh: bool,
    resume: bool,
    explain: bool,
    dry_run: bool,
    yes: bool,
    json: Path | None,
) -> None:
    resolved = resolve(arguments or [], default_recipe, flags)
    if fresh and resume:
        raise UsageError("--fresh and --resume exclude each other; use one of them")
    if json and (explain or dry_run):
        option = "--explain" if explain else "--dry-run"
        raise UsageError(f"{option} trains nothing and has no metrics for --json; omit one of them")
    if explain:
        from minimind.config import explain as explanation

        console.show(explanation(resolved))
        return
    recipe = resolved.recipe
    from minimind.training.run import has_begun

    begun = recipe.out is not None and has_begun(Path(recipe.out))
    if resume and launcher.is_main_process() and not begun:
        where = recipe.out or "no --out is given"
        raise UsageError(f"{where}: there is no run to resume; omit --resume")
    if not launcher.is_distributed():  # the processes of one run do not download side by side
        ensure_downloaded(data_paths(recipe), yes)
    if (nproc or 1) > 1 and not launcher.is_distributed():
        launcher.launch_processes(nproc or 1)
        return
    launcher.exit_with_parent()
    console.console.quiet = not launcher.is_main_process()
    from minimind.inference.generate import sampler
    from minimind.training import stage

    reporter = console.RichReporter()
    if dry_run:
        stage.dry_run(recipe, reporter=reporter, fresh=fresh)
        return
    result = stage.run_stage(
        recipe, reporter=reporter, fresh=fresh, generate_samples=sampler(recipe, reporter.say)
    )
    finish(result, json)


def resolve(
    arguments: list[str], default_recipe: str | None, flags: dict[str, Any]
) -> "ResolvedRecipe":
    """Load the recipe with KEY=VALUE overrides and command-line options."""
    from minimind.config import load_recipe

    name, overrides = recipe_and_settings(arguments, default_recipe)
    set_flags = {key: value for key, value in flags.items() if value}
    return load_recipe(name, overrides=overrides, flags=set_flags)


def data_paths(recipe: "Recipe") -> list[str]:
    """Return the paths and names of all data that a recipe uses."""
    data = recipe.data
    return [each.path for each in (*data.sources, *data.validation, *data.retention)]


def recipe_and_settings(
    arguments: list[str], default_recipe: str | None = None
) -> tuple[str, list[str]]:
    """Split arguments into the recipe, or the default one, and the KEY=VALUE overrides."""
    recipes = [arg for arg in arguments if "=" not in arg or os.path.isfile(arg)]
    overrides = [arg for arg in arguments if arg not in recipes]
    if len(recipes) > 1:
        raise UsageError(
            f"two recipes are given, {recipes[0]} and {recipes[1]}. If one of them is a data file, "
            'repeat --data before each file, or quote the pattern: --data "texts/*.jsonl"'
        )
    name = recipes[0] if recipes else default_recipe
    if name is None:
        raise UsageError(
            "no recipe is given; name a TOML file or a packaged recipe such as pretrain-small"
        )
    return name, overrides


def finish(result: "StageResult", json: Path | None) -> None:
    """Print the outcome of a run; exit with `launcher.interrupted_status` if it was stopped."""
    if json and launcher.is_main_process():
        write_json(json, result.summary)
    if not result.finished:
        done = result.summary["steps"]
        console.say(f"stopped after step {done:,}; run {same_command()} again to resume")
        raise typer.Exit(launcher.interrupted_status())
    console.show_metrics(result.run.name, result.summary)
    verb = "generate" if result.summary["objective"] == "pretrain" else "chat"
    prompt = ' "..."' if verb == "generate" else ""
    if result.adapter:
        command = console.command(verb, Path(result.summary["base"]), "--adapter", result.run)
        console.say(f"The adapter is in {result.adapter}. Try it: {command}{prompt}")
    else:
        command = console.command(verb, result.run)
        console.say(f"The model is in {result.model}. Try it: {command}{prompt}")
    if not result.trained:
        console.say(_how_to_train_longer(result))


def _how_to_train_longer(result: "StageResult") -> str:
    """Advise on a run that was finished before; it can be extended while a checkpoint is left."""
    from minimind.training.checkpoint import newest_state

    longer = f"training.steps={2 * result.summary['steps']}"
    if newest_state(result.run) is None:
        return f"To train longer, start over: add {longer} --fresh to the same command"
    return f"To train longer, add {longer} to {same_command()}; to start over, add --fresh"
