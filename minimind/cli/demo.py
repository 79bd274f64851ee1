"""`minimind demo`: every stage in one command, on a corpus generated from the built-in textbook."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minimind.cli import console
from minimind.cli.demo_results import ADAPTER_IDENTITY, evaluate_demo, show_results
from minimind.cli.options import Device
from minimind.cli.steps import (
    Step,
    check_results,
    copy_final_model,
    finished_summary,
    new_directory,
    planned_tokens,
    remove_results,
    run_steps,
    timed,
    train_stage,
    train_tokenizer_once,
)

if TYPE_CHECKING:
    from minimind.config.settings import Recipe
    from minimind.training.stage import StageResult

_STAGES = {
    "pretrain": "pretraining: predict the next token",
    "sft-single": "fine-tuning: answer a question",
    "sft-multi": "fine-tuning: multi-turn conversations",
    "dpo": "preference optimization: prefer the better of two answers",
    "identity": "LoRA: an adapter that gives the model a name",
}
_PREVIOUS_STAGE = {
    "sft-single": "pretrain",
    "sft-multi": "sft-single",
    "dpo": "sft-multi",
    "identity": "dpo",
}
_VOCAB_SIZE = 3200
_SEED = 1
_CORPUS = {
    "prose_characters": 3_000_000,
    "held_out_characters": 60_000,
    "single_turn": 300_000,
    "multi_turn": 20_000,
    "preference_pairs": 12_000,
    "multiple_choice_questions": 2_000,
}


def demo(
    out: Annotated[Path, typer.Option(help="Folder for all results.")] = Path("out/demo"),
    model: Annotated[
        str | None,
        typer.Option(
            help="Model preset; default: demo on a CPU, small on a GPU. moe: a mixture of experts; "
            "on a CPU, one as small as demo."
        ),
    ] = None,
    device: Device = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="Discard the previous run.")] = False,
) -> None:
    """Train a small chat model, from the corpus to the report.

    The steps: corpus, tokenizer, pretraining, fine-tuning, preference optimization, LoRA, report.
    """
    from minimind.model.device import choose_device
    from minimind.reporting.report import make_report

    chosen = choose_device(device)
    on_cpu = chosen.type == "cpu"
    preset = model or ("demo" if on_cpu else "small")
    if preset == "moe" and on_cpu:  # 113 million parameters would take days
        preset = "demo-moe"
    recipes = stage_recipes(preset, str(chosen), out)
    folders = ("corpus", "stores", *_STAGES)
    check_results(out, "demo", folders, fresh=fresh)
    if fresh:
        remove_results(out, folders)
    out.mkdir(parents=True, exist_ok=True)
    with timed(out, "demo") as total_seconds:
        summary = _run_steps(out, recipes, total_seconds)
    make_report([out]).write(out / "report.html")
    show_results(out, summary)


def stage_recipes(preset: str, device: str, out: Path) -> "dict[str, Recipe]":
    """Load the recipe of each stage of the demo."""
    return {stage: _recipe(stage, preset, device, out) for stage in _STAGES}


def _run_steps(
    out: Path, recipes: dict[str, "Recipe"], total_seconds: Callable[[], float]
) -> dict[str, Any]:
    """Run the steps that are not finished yet; return the summary."""
    tokens = sum(recipe.weighted_tokens(planned_tokens(recipe)) for recipe in recipes.values())
    results: dict[str, StageResult] = {}
    summary: dict[str, Any] = {}

    def train(stage: str) -> None:
        results[stage] = train_stage(recipes[stage], tokens)

    def evaluate() -> None:
        finished = finished_summary(out, "demo")
        if finished is None:
            copy_final_model(results["dpo"].model, out)
            stages = {stage: result.summary for stage, result in results.items()}
            finished = evaluate_demo(out, recipes["pretrain"], stages, total_seconds, seed=_SEED)
        summary.update(finished)

    run_steps(
        [
            Step(
                "the corpus, generated from the built-in textbook",
                lambda: _write_corpus(out / "corpus"),
            ),
            Step("the tokenizer", lambda: _train_tokenizer(out / "tokenizer", out / "corpus")),
            *(Step(title, partial(train, stage)) for stage, title in _STAGES.items()),
            Step("the quiz and the report", evaluate),
        ]
    )
    return summary


def _write_corpus(corpus: Path) -> None:
    """Generate the corpus unless it exists, and report its size."""
    from minimind.data.textbook import load_subjects, write_corpus

    if not corpus.is_dir():
        with new_directory(corpus) as directory:
            write_corpus(directory, seed=_SEED, **_CORPUS)
    subjects = load_subjects()
    facts = sum(subject.num_facts for subject in subjects)
    size = sum(file.stat().st_size for file in corpus.iterdir())
    console.say(
        f"{facts:,} facts of {len(subjects)} subjects as prose, dialogues, preference pairs and "
        f"multiple-choice questions: {console.format_size(size)} in {corpus}"
    )


def _train_tokenizer(directory: Path, corpus: Path) -> None:
    """Train the tokenizer unless it exists, and report its compression on held-out text."""
    from minimind.data.invalid import InvalidRecords
    from minimind.data.read import read_texts

    # Without the dialogues, whose set phrases would become tokens that span whole questions.
    prose = [corpus / "pretrain.jsonl"]
    tokenizer = train_tokenizer_once(
        directory, lambda: read_texts(prose, invalid=InvalidRecords()), _VOCAB_SIZE
    )
    text = (corpus / "held-out.jsonl").read_text("utf-8")
    compression = len(text) / len(tokenizer.encode(text))
    console.say(
        f"{tokenizer.vocab_size:,} tokens, {compression:.2f} characters per token, in {directory}"
    )


def _recipe(stage: str, preset: str, device: str, out: Path) -> "Recipe":
    from minimind.config import load_recipe

    corpus = out / "corpus"
    flags: dict[str, Any] = {
        "out": str(out / stage),
        "tokenizer": str(out / "tokenizer"),
        "device": device,
        "data.store": str(out / "stores"),
    }
    if stage == "pretrain":
        flags["model.preset"] = preset
        flags["data.validation"] = [str(corpus / "held-out.jsonl")]
    else:
        flags["model.init"] = str(out / _PREVIOUS_STAGE[stage])
    if stage == "identity":
        flags["data.variables"] = ADAPTER_IDENTITY
        return load_recipe("lora-identity", flags=flags).recipe
    flags["data.sources"] = [str(corpus / f"{stage}.jsonl")]
    if stage == "sft-multi":  # a share of single-turn data, against forgetting
        flags["data.sources"].append(f"{corpus / 'sft-single.jsonl'}@0.2")
    return load_recipe(f"demo-{stage}", flags=flags).recipe
