"""`minimind demo`: the whole road in one command, on a corpus of its own."""

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minimind.cli import console

if TYPE_CHECKING:
    from minimind.config.settings import Recipe
    from minimind.evaluation.quiz import Marked
    from minimind.model import Transformer
    from minimind.tokenizer import Tokenizer

_STAGES = {"pretrain": "pretraining", "sft-single": "single turn", "sft-multi": "several turns"}
_QUIZ_QUESTIONS = 400
_PROMPTS = {"pretrain": ["长江是", "问：中国的首都是哪里？答："], "sft": ["泰山在哪里？", "你好"]}


def demo(
    out: Annotated[Path, typer.Option(help="Where everything is kept.")] = Path("out/demo"),
    model: Annotated[
        str | None, typer.Option(help="Preset; default: demo on a CPU, small on a GPU.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over.")] = False,
) -> None:
    """Make a corpus and a tokenizer, pretrain, fine-tune, examine, report: a model of your own."""
    from minimind.model.device import choose_device
    from minimind.training.stage import run_stage

    started = time.perf_counter()
    if fresh:
        for name in ("corpus", "tokenizer", *_STAGES, "model", "stores"):
            shutil.rmtree(out / name, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    reporter = console.RichReporter()
    chosen = choose_device(device)
    preset = model or ("demo" if chosen.type == "cpu" else "small")
    console.heading("1/6", "writing the corpus, “the textbook”")
    corpus = _corpus(out / "corpus")
    console.heading("2/6", "training the tokenizer")
    _tokenizer(out / "tokenizer", corpus)
    results = {}
    for number, (stage, title) in enumerate(_STAGES.items()):
        console.heading(f"{number + 3}/6", title)
        recipe = _recipe(stage, preset, str(chosen), out, corpus)
        from minimind.cli.train import sampler

        result = run_stage(
            recipe, reporter=reporter, on_validation=sampler(recipe, reporter)
        )
        if result.model is None:
            console.say("stopped; `minimind demo` again goes on from here")
            raise typer.Exit(130)
        results[stage] = result
    _publish(out)
    console.heading("6/6", "the quiz and the report")
    raise SystemExit(started)
