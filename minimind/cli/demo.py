"""`minimind demo`: every stage in one command, on a corpus generated from the built-in textbook."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minimind.cli import console
from minimind.cli.demo_results import ADAPTER_IDENTITY, evaluate_demo, show_results
from minimind.cli.options import Device
from minimind.cli.plan import duration

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
_NUM_STEPS = len(_STAGES) + 3  # corpus, tokenizer, the stages, evaluation
_ESTIMATE_AFTER = 20  # steps of pretraining
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
    recipes = {stage: _recipe(stage, preset, str(chosen), out) for stage in _STAGES}
    if fresh:
        _clear(out)
    out.mkdir(parents=True, exist_ok=True)
    with timed(out) as total_seconds:
        summary = _run_steps(out, recipes, total_seconds)
    make_report([out]).write(out / "report.html")
    show_results(out, summary)


def _run_steps(
    out: Path, recipes: dict[str, "Recipe"], total_seconds: Callable[[], float]
) -> dict[str, Any]:
    """Run the steps that are not finished yet; return the summary."""
    console.heading(f"1/{_NUM_STEPS}", "the corpus, generated from the built-in textbook")
    _write_corpus(out / "corpus")
    console.heading(f"2/{_NUM_STEPS}", "the tokenizer")
    _train_tokenizer(out / "tokenizer", out / "corpus")
    results = {}
    for number, (stage, title) in enumerate(_STAGES.items(), 3):
        console.heading(f"{number}/{_NUM_STEPS}", title)
        results[stage] = _train(recipes[stage], _weighted_tokens(recipes.values()))
    console.heading(f"{_NUM_STEPS}/{_NUM_STEPS}", "the quiz and the report")
    summary_file = out / "summary.json"
    if summary_file.is_file():
        console.say("already finished; --fresh discards the results and runs the demo again")
        summary: dict[str, Any] = json.loads(summary_file.read_text("utf-8"))
        return summary
    trained = results["dpo"].model
    assert trained is not None, "an interrupted stage ends the demo"
    with _new_directory(out / "model") as directory:
        shutil.copytree(trained, directory)
    return evaluate_demo(
        out,
        recipes["pretrain"],
        {stage: result.summary for stage, result in results.items()},
        total_seconds,
        seed=_SEED,
    )


@contextmanager
def timed(out: Path) -> Iterator[Callable[[], float]]:
    """Yield a function that returns the seconds spent on the demo, earlier sessions included.

    `time.json` stores the seconds of earlier sessions and the start time of the running one. A
    session that was killed counts up to the last change of a metrics file.
    """
    path = out / "time.json"
    stored = json.loads(path.read_text("utf-8")) if path.is_file() else {"seconds": 0.0}
    before = stored["seconds"]
    if (began := stored.get("began")) is not None:
        changes = [file.stat().st_mtime for file in (path, *out.glob("*/metrics.jsonl"))]
        before += max(0.0, max(changes) - began)
    started, clock = time.time(), time.perf_counter()

    def total() -> float:
        seconds: float = before + time.perf_counter() - clock
        return seconds

    console.write_json(path, {"seconds": before, "began": started})
    try:
        yield total
    finally:
        console.write_json(path, {"seconds": total()})


def _clear(out: Path) -> None:
    for name in ("corpus", "tokenizer", "stores", "model", "report-plots", *_STAGES):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("summary.json", "time.json", "report.html", "report.md"):
        (out / name).unlink(missing_ok=True)


@contextmanager
def _new_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory name that replaces `path` when the block has succeeded."""
    temporary = path.with_name(f"{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    yield temporary
    shutil.rmtree(path, ignore_errors=True)
    os.replace(temporary, path)


def _write_corpus(corpus: Path) -> None:
    """Generate the corpus unless it exists, and report its size."""
    from minimind.data.textbook import load_subjects, write_corpus

    if not corpus.is_dir():
        with _new_directory(corpus) as directory:
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
    from minimind.tokenizer import Tokenizer, train_tokenizer

    if not directory.is_dir():
        # Without the dialogues, whose set phrases would become tokens that span whole questions.
        texts = read_texts([corpus / "pretrain.jsonl"], invalid=InvalidRecords())
        with _new_directory(directory) as temporary:
            train_tokenizer(texts, vocab_size=_VOCAB_SIZE).save(temporary)
    text = (corpus / "held-out.jsonl").read_text("utf-8")
    tokenizer = Tokenizer.load(directory)
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


class _EstimatingReporter(console.RichReporter):
    """Report the training time of all stages once the first steps have shown the speed."""

    def __init__(self, tokens: int, tokens_per_step: int) -> None:
        super().__init__()
        self._tokens, self._tokens_per_step = tokens, tokens_per_step
        self._started: tuple[int, float] | None = None  # the first step seen, and its time
        self._counts_steps = False

    def start(self, title: str, total: int, done: int = 0, unit: str = "step") -> None:
        """Begin a task; only tasks that count training steps show the speed."""
        super().start(title, total, done, unit)
        self._counts_steps = unit == "step"

    def progress(self, done: int, total: int, note: str = "") -> None:
        """Draw progress; after `_ESTIMATE_AFTER` steps, report the estimate once."""
        super().progress(done, total, note)
        if self._counts_steps and self._tokens_per_step and total > _ESTIMATE_AFTER:
            if self._started is None:
                self._started = done, time.perf_counter()
            elif done - self._started[0] >= _ESTIMATE_AFTER:
                tokens = (done - self._started[0]) * self._tokens_per_step
                rate = tokens / (time.perf_counter() - self._started[1])
                self.say(
                    f"At {rate:,.0f} tokens/s, training takes about {duration(self._tokens / rate)}"
                    " on this machine, all stages together"
                )
                self._tokens_per_step = 0


def _weighted_tokens(recipes: "Iterable[Recipe]") -> int:
    """Return the tokens of all stages; DPO counts 1.5 times, for its reference pass."""
    return sum(
        (recipe.training.steps or 0)
        * recipe.training.global_batch_size
        * recipe.data.seq_len
        * (3 if recipe.objective == "dpo" else 2)
        // 2
        for recipe in recipes
    )


def _train(recipe: "Recipe", tokens_of_all_stages: int) -> "StageResult":
    """Train a stage, or resume it; pretraining also estimates the time of all stages."""
    from minimind.cli.train import sampler
    from minimind.training.stage import run_stage

    per_step = recipe.training.global_batch_size * recipe.data.seq_len
    is_first = recipe.objective == "pretrain"
    reporter = _EstimatingReporter(tokens_of_all_stages, per_step if is_first else 0)
    result = run_stage(recipe, reporter=reporter, generate_samples=sampler(recipe, reporter))
    if not result.finished:
        console.say("stopped; run the same command again to resume")
        raise typer.Exit(130)
    summary = result.summary
    quality = (
        f"{summary['accuracy']:.1%} preference accuracy on held-out pairs"
        if "accuracy" in summary
        else f"{summary['bits_per_byte']:.3f} bits per byte on held-out text"
    )
    console.say(
        f"{summary['tokens']:,} tokens in {summary['seconds']:.0f} s "
        f"({summary['tokens_per_second']:,.0f} tokens/s), {quality}"
    )
    return result
