"""`minimind demo`: the whole road in one command, on a corpus of its own."""

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
from minimind.cli.plan import duration

if TYPE_CHECKING:
    from minimind.config.settings import Recipe
    from minimind.evaluation.quiz import ScoredAnswer
    from minimind.training.stage import StageResult

_STAGES = {
    "pretrain": "pretraining: what the words mean",
    "sft-single": "fine-tuning: answering a question",
    "sft-multi": "fine-tuning: talking in several turns",
    "dpo": "preferences: of two answers, the better one",
    "identity": "an adapter (LoRA): a name of its own",
}
_BEFORE = {"sft-single": "pretrain", "sft-multi": "sft-single", "dpo": "sft-multi"}
_BEFORE |= {"identity": "dpo"}
_CALLED = {"name": "小满", "author": "阿青"}  # what the adapter teaches the model to say
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
_QUIZ_QUESTIONS = 400
_ANSWER_TOKENS = 64
_MOMENTS = ("after pretraining", "after fine-tuning", "after preferences")


def demo(
    out: Annotated[Path, typer.Option(help="Where everything is kept.")] = Path("out/demo"),
    model: Annotated[
        str | None,
        typer.Option(
            help="Preset; default: demo on a CPU, small on a GPU. moe: a mixture of experts, on a "
            "CPU of the demo's size."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over.")] = False,
) -> None:
    """Make a corpus and a tokenizer, pretrain, fine-tune, examine, report: a model of your own."""
    from minimind.model.device import choose_device
    from minimind.reporting.report import make_report

    chosen = choose_device(device)
    on_cpu = chosen.type == "cpu"
    preset = model or ("demo" if on_cpu else "small")
    if preset == "moe" and on_cpu:  # 113 million parameters would take days
        preset = "demo-moe"
    corpus = out / "corpus"
    recipes = {stage: _recipe(stage, preset, str(chosen), out, corpus) for stage in _STAGES}
    if fresh:
        _clear(out)
    out.mkdir(parents=True, exist_ok=True)
    with timed(out) as total_seconds:
        summary = _all_steps(out, recipes, total_seconds)
    make_report([out]).write(out / "report.html")
    _show(out, summary)


def _all_steps(
    out: Path, recipes: dict[str, "Recipe"], total_seconds: Callable[[], float]
) -> dict[str, Any]:
    """Do what was not done before; return the summary."""
    corpus = out / "corpus"
    last = len(_STAGES) + 3
    console.heading(f"1/{last}", "the corpus: a textbook of its own")
    _corpus(corpus)
    console.heading(f"2/{last}", "the tokenizer")
    _tokenizer(out, corpus)
    results = {}
    for number, (stage, title) in enumerate(_STAGES.items(), 3):
        console.heading(f"{number}/{last}", title)
        results[stage] = _run(recipes[stage], _training_tokens(recipes.values()))
    console.heading(f"{last}/{last}", "the quiz and the report")
    summary_file = out / "summary.json"
    if summary_file.is_file():
        console.say("finished before; --fresh starts over")
        summary: dict[str, Any] = json.loads(summary_file.read_text("utf-8"))
        return summary
    _publish(out, results["dpo"])
    return _examine(out, recipes, results, total_seconds)


@contextmanager
def timed(out: Path) -> Iterator[Callable[[], float]]:
    """Yield a function that returns the seconds spent on the demo, earlier starts included.

    `time.json` holds the seconds of earlier starts and when the running one began. One that was
    killed is counted up to the last line of its metrics.
    """
    path = out / "time.json"
    known = json.loads(path.read_text("utf-8")) if path.is_file() else {"seconds": 0.0}
    before = known["seconds"]
    if (began := known.get("began")) is not None:
        seen = [one.stat().st_mtime for one in (path, *out.glob("*/metrics.jsonl"))]
        before += max(0.0, max(seen) - began)
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


def _corpus(corpus: Path) -> None:
    """Write the textbook's corpus, whole or not at all."""
    from minimind.data.textbook import load_subjects, write_corpus

    if not corpus.is_dir():
        making = corpus.with_name("corpus.making")
        shutil.rmtree(making, ignore_errors=True)
        write_corpus(making, seed=_SEED, **_CORPUS)
        os.replace(making, corpus)
    subjects = load_subjects()
    facts = sum(subject.num_facts for subject in subjects)
    size = sum(file.stat().st_size for file in corpus.iterdir())
    console.say(
        f"{facts:,} facts of {len(subjects)} subjects as prose, dialogues, preference pairs and "
        f"exams: {size / 1e6:.0f} MB in {corpus}"
    )


def _tokenizer(out: Path, corpus: Path) -> None:
    from minimind.data.invalid import InvalidRecords
    from minimind.data.read import read_texts
    from minimind.tokenizer import Tokenizer, train_tokenizer

    place = out / "tokenizer"
    # Not on the dialogues: words made of their set phrases would be questions learned by heart.
    files = [corpus / "pretrain.jsonl"]
    if not place.is_dir():
        making = out / "tokenizer.making"
        shutil.rmtree(making, ignore_errors=True)
        train_tokenizer(read_texts(files, invalid=InvalidRecords()), vocab_size=_VOCAB_SIZE).save(
            making
        )
        os.replace(making, place)
    text = (corpus / "held-out.jsonl").read_text("utf-8")
    tokenizer = Tokenizer.load(place)
    rate = len(text) / len(tokenizer.encode(text))
    console.say(f"{tokenizer.vocab_size:,} words, {rate:.2f} characters a token, in {place}")


def _recipe(stage: str, preset: str, device: str, out: Path, corpus: Path) -> "Recipe":
    from minimind.config import load_recipe

    before = _BEFORE.get(stage)
    data = corpus / f"{stage}.jsonl"
    flags: dict[str, Any] = {
        "out": str(out / stage),
        "tokenizer": str(out / "tokenizer"),
        "device": device,
        "data.store": str(out / "stores"),
    }
    flags |= {"model.init": str(out / before)} if before else {"model.preset": preset}
    if stage == "identity":
        return load_recipe("lora-identity", flags=flags | {"data.variables": _CALLED}).recipe
    flags["data.sources"] = [str(data)]
    if stage == "pretrain":
        flags["data.validation"] = [str(corpus / "held-out.jsonl")]
    if stage == "sft-multi":  # what was learned before is kept by practising it on
        flags["data.sources"] = [f"{data}", f"{corpus / 'sft-single.jsonl'}@0.2"]
    return load_recipe(f"demo-{stage}", flags=flags).recipe


class _EstimatingReporter(console.RichReporter):
    """Reports how long all stages will take once the first steps show the speed of this machine."""

    def __init__(self, tokens: int, tokens_per_step: int) -> None:
        super().__init__()
        self._tokens, self._tokens_per_step = tokens, tokens_per_step
        self._started: tuple[int, float] | None = None  # the first step seen, and when

    def progress(self, done: int, total: int, note: str = "") -> None:
        """Draw progress; after `_ESTIMATE_AFTER` steps, report the estimate once."""
        super().progress(done, total, note)
        if self._tokens_per_step and total > _ESTIMATE_AFTER:
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


def _training_tokens(recipes: "Iterable[Recipe]") -> int:
    """Return the positions of all stages; those of DPO weigh more, for its reference pass."""
    return sum(
        (recipe.training.steps or 0)
        * recipe.training.global_batch_size
        * recipe.data.seq_len
        * (3 if recipe.objective == "dpo" else 2)
        // 2
        for recipe in recipes
    )


def _run(recipe: "Recipe", tokens: int) -> "StageResult":
    """Train a stage; `tokens` of all stages are for the estimate, which pretraining gives."""
    from minimind.cli.train import sampler
    from minimind.training.stage import run_stage

    per_step = recipe.training.global_batch_size * recipe.data.seq_len
    reporter = _EstimatingReporter(tokens, per_step * (recipe.objective == "pretrain"))
    result = run_stage(recipe, reporter=reporter, generate_samples=sampler(recipe, reporter))
    if not result.finished:
        console.say("stopped; the same command continues from here")
        raise typer.Exit(130)
    summary = result.summary
    held_out = (
        f"{summary['accuracy']:.1%} preference accuracy on held-out pairs"
        if "accuracy" in summary
        else f"{summary['bits_per_byte']:.3f} bits per byte on held-out text"
    )
    console.say(
        f"{summary['tokens']:,} tokens in {summary['seconds']:.0f} s "
        f"({summary['tokens_per_second']:,.0f} per second), {held_out}"
    )
    return result


def _publish(out: Path, last: "StageResult") -> None:
    """Put the last stage's model where the demo's own is looked for."""
    assert last.model is not None, "a stopped stage ends the demo"
    making = out / "model.making"
    shutil.rmtree(making, ignore_errors=True)
    shutil.copytree(last.model, making)
    shutil.rmtree(out / "model", ignore_errors=True)
    os.replace(making, out / "model")


def _examine(
    out: Path,
    recipes: dict[str, "Recipe"],
    results: dict[str, "StageResult"],
    total_seconds: Callable[[], float],
) -> dict[str, Any]:
    """The quiz, the eight questions as each stage answers them, `summary.json`."""
    from minimind.data.textbook import demo_questions, sample_quiz
    from minimind.evaluation.quiz import by_subject, score_answers
    from minimind.inference.generate import answer_all, continue_all
    from minimind.inference.load import load_for_inference
    from minimind.model.device import choose_device
    from minimind.training.build import build_initial_model

    device = recipes["pretrain"].device
    questions, quiz = demo_questions(), sample_quiz(_QUIZ_QUESTIONS, seed=_SEED)
    asked = [question.question for question in questions]
    pretrained, tokenizer = load_for_inference(out / "pretrain", device)
    untrained = build_initial_model(recipes["pretrain"], tokenizer).to(choose_device(device))
    before = continue_all(untrained, tokenizer, asked, max_new_tokens=24)
    prompts = [f"问：{question}答：" for question in asked]
    between = [
        text.split("问：")[0]
        for text in continue_all(pretrained, tokenizer, prompts, max_new_tokens=_ANSWER_TOKENS)
    ]
    reporter = console.RichReporter()

    def examined(run: Path) -> tuple[list["ScoredAnswer"], list["ScoredAnswer"]]:
        """The eight questions and the quiz, asked and marked."""
        model, _ = load_for_inference(run, device)
        answers = answer_all(model, tokenizer, asked, max_new_tokens=_ANSWER_TOKENS)
        reporter.start("answering the quiz", len(quiz), unit="question")
        told = answer_all(
            model,
            tokenizer,
            [question.question for question in quiz],
            max_new_tokens=_ANSWER_TOKENS,
            progress=reporter.progress,
        )
        reporter.stop()
        return score_answers(questions, answers), score_answers(quiz, told)

    tuned, marked_before = examined(out / "sft-multi")
    after, marked = examined(out / "model")
    subjects = by_subject(marked)
    measured = ("seconds", "tokens", "tokens_per_second", "bits_per_byte")
    stages = {
        name: {key: result.summary[key] for key in measured if key in result.summary}
        for name, result in results.items()
    }
    dpo = results["dpo"].summary
    summary = {
        "training_seconds": sum(stage["seconds"] for stage in stages.values()),
        "total_seconds": total_seconds(),
        "device": device,
        "parameters": results["pretrain"].summary["parameters"],
        "stages": stages,
        "unigram_bits_per_byte": results["pretrain"].summary["unigram_bits_per_byte"],
        "quiz": {
            # By keywords; see minimind/data/textbook/quiz.py and fluency.py.
            "correct": sum(one.right for one in marked),
            "fluent": sum(one.fluent for one in marked),
            "correct_before_preferences": sum(one.right for one in marked_before),
            "questions": len(marked),
            "by_subject": {
                name: {"correct": right, "questions": count}
                for name, (right, count) in subjects.items()
            },
            "wrong": [
                {
                    "question": one.question.question,
                    "answer": one.answer,
                    "expected": one.question.answer,
                }
                for one in marked
                if not one.right
            ],
        },
        "preferences": {key: dpo[key] for key in ("first_accuracy", "accuracy", "rewards/margin")},
        "identity": _CALLED | _who_it_is(out, device, results["identity"].summary),
        "eight": [
            {
                "question": question.question,
                "before_training": before[i],
                "after_pretraining": between[i],
                "after_fine_tuning": tuned[i].answer,
                "after_preferences": after[i].answer,
                "correct": after[i].right,
                "fluent": after[i].fluent,
            }
            for i, question in enumerate(questions)
        ],
    }
    console.write_json(out / "summary.json", summary)
    return summary


def _who_it_is(out: Path, device: str, trained: dict[str, Any]) -> dict[str, Any]:
    """Ways of asking who it is that were never trained on, without and with the adapter."""
    from minimind.data.textbook import held_out_identity
    from minimind.inference.generate import answer_all
    from minimind.inference.load import load_for_inference

    questions = held_out_identity()
    said = []
    for adapter in (None, out / "identity"):
        model, tokenizer = load_for_inference(out / "model", device, adapter=adapter)
        said.append(answer_all(model, tokenizer, [q.question for q in questions]))
    answers = [
        {
            "question": q.question,
            "before": before,
            "after": after,
            "right": q.is_right(after, _CALLED),
        }
        for q, before, after in zip(questions, *said, strict=True)
    ]
    return {
        "correct": sum(answer["right"] for answer in answers),
        "questions": len(answers),
        # Of other questions: what it costs to learn a name.
        "retention_loss_before": trained["first_retention_loss"],
        "retention_loss_after": trained["retention_loss"],
        "answers": answers,
    }


def _marks(one: dict[str, Any]) -> list[str]:
    """The scores of one of the eight answers; a demo of an earlier version has no fluency."""
    return [{True: "✓", False: "✗", None: "–"}[one.get(name)] for name in ("correct", "fluent")]


def _show(out: Path, summary: dict[str, Any]) -> None:
    """The eight answers, the summary table, and how to go on."""
    console.show(
        console.table(
            "The eight questions",
            ["question", *_MOMENTS, "keywords", "fluent"],
            (
                [
                    one["question"],
                    one["after_pretraining"],
                    one["after_fine_tuning"],
                    one["after_preferences"],
                    *_marks(one),
                ]
                for one in summary["eight"]
            ),
        )
    )
    quiz, stages = summary["quiz"], summary["stages"]
    preferences, identity = summary["preferences"], summary["identity"]
    rows = [
        ("parameters", summary["parameters"]),
        ("device", summary["device"]),
        ("training, all stages", f"{summary['training_seconds']:,.0f} s"),
        ("the whole demo", f"{summary['total_seconds']:,.0f} s"),
        *(
            (f"{name}: tokens/s", round(stage["tokens_per_second"]))
            for name, stage in stages.items()
        ),
        ("bits per byte, held out", round(stages["pretrain"]["bits_per_byte"], 3)),
        ("bits per byte, unigram model", round(summary["unigram_bits_per_byte"], 3)),
        (
            "quiz, words never trained on",
            f"{quiz['correct']} of {quiz['questions']} match the keywords "
            f"({quiz['correct'] / quiz['questions']:.1%})",
        ),
        ("quiz, fluent answers", f"{quiz.get('fluent', '–')} of {quiz['questions']}"),
        ("the same before preferences", f"{quiz['correct_before_preferences']} match the keywords"),
        ("the eight", f"{sum(one['correct'] for one in summary['eight'])} of 8 match the keywords"),
        (
            "pairs of answers told apart",
            f"{preferences['accuracy']:.1%} (before: {preferences['first_accuracy']:.1%})",
        ),
        (
            f"says that it is {identity['name']}, by {identity['author']}",
            f"{identity['correct']} of {identity['questions']} ways of asking",
        ),
    ]
    console.show(console.table("Summary", ["figure", "value"], rows, numbers=1))
    console.say(f"The report with all curves: {out / 'report.html'}")
    console.say(f"Chat with your model: {console.command('chat', out)}")
    named = console.command("chat", out, "--adapter", out / "identity")
    console.say(f"And by its name: {named}")
