"""`minimind pretrain`, `sft`, `lora`, `dpo`, and `minimind train RECIPE` behind them."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minimind.cli import console, launcher
from minimind.errors import UsageError, shell_words

if TYPE_CHECKING:
    from minimind.config import ResolvedRecipe
    from minimind.config.settings import Recipe
    from minimind.model import Transformer
    from minimind.tokenizer import Tokenizer
    from minimind.training.stage import GenerateSamples, StageResult

Arguments = Annotated[
    list[str] | None,
    typer.Argument(metavar="RECIPE KEY=VALUE", help="A recipe, and settings to change."),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        metavar="DATA", help="File, folder or glob (quoted), with @WEIGHT if wanted; give it again."
    ),
]
Out = Annotated[str | None, typer.Option(help="Run directory.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over, forgetting an earlier run.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with a run; stop if there is none.")]
Explain = Annotated[
    bool, typer.Option("--explain", help="Show each setting and where it came from, and stop.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Prepare everything, say what would be done, and stop.")
]
Nproc = Annotated[
    int | None,
    typer.Option("--nproc", min=1, help="Processes on this machine that share the work."),
]
Json = Annotated[Path | None, typer.Option("--json", help="Write the final figures here too.")]


def pretrain(
    arguments: Arguments = None,
    data: Data = None,
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer directory.")] = None,
    out: Out = None,
    device: Device = None,
    nproc: Nproc = None,
    fresh: Fresh = False,
    resume: Resume = False,
    explain: Explain = False,
    dry_run: DryRun = False,
    json: Json = None,
) -> None:
    """Train a new model on running text."""
    flags = {"objective": "pretrain", "data.sources": data, "tokenizer": tokenizer}
    flags |= {"out": out, "device": device}
    _stage(arguments, "pretrain-small", flags, nproc, fresh, resume, explain, dry_run, json)


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
    json: Json = None,
) -> None:
    """Fine-tune a model on conversations, single and multi turn."""
    flags = {"objective": "sft", "data.sources": data, "model.init": model}
    flags |= {"out": out, "device": device}
    _stage(arguments, "sft-small", flags, nproc, fresh, resume, explain, dry_run, json)


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
    json: Json = None,
) -> None:
    """Train a small adapter (LoRA) beside a model that stays as it is."""
    flags = {"data.sources": data, "model.init": model, "out": out, "device": device}
    if resolve(arguments or [], "lora-small", flags).recipe.lora is None:
        raise UsageError(
            "the recipe trains the whole model; take one with a [lora] table, such as lora-small, "
            "or set lora.rank=8"
        )
    _stage(arguments, "lora-small", flags, nproc, fresh, resume, explain, dry_run, json)


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
    json: Json = None,
) -> None:
    """Make a chat model prefer the better of two answers (direct preference optimisation)."""
    flags = {"objective": "dpo", "data.sources": data, "model.init": model}
    flags |= {"out": out, "device": device}
    _stage(arguments, "dpo-small", flags, nproc, fresh, resume, explain, dry_run, json)


def train(
    arguments: Arguments = None,
    out: Out = None,
    device: Device = None,
    nproc: Nproc = None,
    fresh: Fresh = False,
    resume: Resume = False,
    explain: Explain = False,
    dry_run: DryRun = False,
    json: Json = None,
) -> None:
    """Run the stage that a recipe describes."""
    flags = {"out": out, "device": device}
    _stage(arguments, None, flags, nproc, fresh, resume, explain, dry_run, json)


def _stage(
    arguments: list[str] | None,
    standard_recipe: str | None,
    flags: dict[str, Any],
    nproc: int | None,
    fresh: bool,
    resume: bool,
    explain: bool,
    dry_run: bool,
    json: Path | None,
) -> None:
    resolved = resolve(arguments or [], standard_recipe, flags)
    if explain:
        from minimind.config import explain as explanation

        console.show(explanation(resolved))
        return
    recipe = resolved.recipe
    if fresh and resume:
        raise UsageError("--fresh and --resume exclude each other; give one of them")
    from minimind.training.run import has_begun

    begun = recipe.out is not None and has_begun(Path(recipe.out))
    if resume and launcher.is_first_process() and not begun:
        where = recipe.out or "no --out is given"
        raise UsageError(f"{where}: there is no run to go on with; leave out --resume")
    if (nproc or 1) > 1 and not dry_run and not launcher.is_one_of_several():
        launcher.run_workers(nproc or 1)
        return
    launcher.end_with_starter()
    console.console.quiet = not launcher.is_first_process()
    from minimind.training.stage import prepare_stage, run_stage

    reporter = console.RichReporter()
    if dry_run:
        prepare_stage(recipe, reporter=reporter)
        return
    result = run_stage(
        recipe, reporter=reporter, fresh=fresh, generate_samples=sampler(recipe, reporter)
    )
    finish(result, json)


def resolve(
    arguments: list[str], standard_recipe: str | None, flags: dict[str, Any]
) -> "ResolvedRecipe":
    """Recipe, then KEY=VALUE, then flags: the later wins."""
    from minimind.config import load_recipe

    name, overrides = recipe_and_settings(arguments, standard_recipe)
    given = {key: value for key, value in flags.items() if value}
    return load_recipe(name, overrides=overrides, flags=given)


def recipe_and_settings(
    arguments: list[str], standard_recipe: str | None = None
) -> tuple[str, list[str]]:
    """The recipe that is named, or the standard one, and the KEY=VALUE arguments."""
    recipes = [one for one in arguments if "=" not in one or os.path.isfile(one)]
    overrides = [one for one in arguments if one not in recipes]
    if len(recipes) > 1:
        raise UsageError(
            f"two recipes are given, {recipes[0]} and {recipes[1]}. If one is data: repeat --data "
            'before each file, or quote the pattern: --data "texts/*.jsonl"'
        )
    name = recipes[0] if recipes else standard_recipe
    if name is None:
        raise UsageError("which recipe? Give a TOML file, or a name such as pretrain-small")
    return name, overrides


def sampler(recipe: "Recipe", reporter: "console.RichReporter") -> "GenerateSamples":
    """A callback that lets the model continue or answer the recipe's prompts, and shows it."""

    def write(model: "Transformer", tokenizer: "Tokenizer") -> list[dict[str, str]]:
        from minimind.inference.generate import answer_all, continue_all

        prompts = recipe.validation.prompts
        chat = recipe.objective != "pretrain"
        texts = (answer_all if chat else continue_all)(model, tokenizer, prompts)
        model.train()
        for prompt, text in zip(prompts, texts, strict=True):
            reporter.say(f"  {prompt} → {text}" if chat else f"  {prompt}{text}")
        return [{"prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)]

    return write


def finish(result: "StageResult", json: Path | None) -> None:
    """Say how it ended; a stopped run ends with the exit status that `launcher.stopped` says."""
    if json and launcher.is_first_process():
        console.write_json(json, result.summary)
    if not result.finished:
        done = result.summary["steps"]
        console.say(f"stopped after step {done:,}; the same command goes on from there")
        raise typer.Exit(launcher.stopped())
    console.show_metrics(result.run.name, result.summary)
    verb = "generate" if result.summary["objective"] == "pretrain" else "chat"
    prompt = ' "..."' if verb == "generate" else ""
    if result.adapter:
        command = shell_words(verb, Path(result.summary["base"]), "--adapter", result.run)
        console.say(f"The adapter is in {result.adapter}. Try it: minimind {command}{prompt}")
    else:
        command = shell_words(verb, result.run)
        console.say(f"The model is in {result.model}. Try it: minimind {command}{prompt}")
