"""Last step of `minimind road`: answer questions, write `summary.json`, print results."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minimind.cli import console
from minimind.cli.steps import STAGE_METRICS, continue_as_dialogue, show_next_commands
from minimind.files import write_json

if TYPE_CHECKING:
    from minimind.config.settings import Recipe

_MAX_ANSWER_TOKENS = 96
_ANSWER_KEYS = {  # by objective, as the report names them
    "pretrain": "after_pretraining",
    "sft": "after_fine_tuning",
    "dpo": "after_preferences",
}


def answer_questions(
    out: Path,
    questions: Sequence[str],
    recipes: "Mapping[str, Recipe]",
    stages: Mapping[str, Mapping[str, Any]],
    total_seconds: Callable[[], float],
) -> dict[str, Any]:
    """Answer the questions with the model of each stage, and write `summary.json`.

    stages: the training summary of each stage.
    """
    answers: dict[str, list[str]] = {}
    for name, recipe in recipes.items():
        if questions and recipe.lora is None:
            answers[_ANSWER_KEYS[recipe.objective]] = _answer(out / name, recipe, questions)
    first = next(iter(stages.values()))
    summary = {
        "training_seconds": sum(stage["seconds"] for stage in stages.values()),
        "total_seconds": total_seconds(),
        "device": next(iter(recipes.values())).device,
        "parameters": first["parameters"],
        "stages": {
            name: {key: stage[key] for key in (*STAGE_METRICS, "accuracy") if key in stage}
            for name, stage in stages.items()
        },
        "unigram_bits_per_byte": first.get("unigram_bits_per_byte"),
        "questions": [
            {"question": question}
            | {key: texts[number] for key, texts in answers.items()}
            | _score(question, [texts[number] for texts in answers.values()][-1])
            for number, question in enumerate(questions)
        ],
    }
    write_json(out / "summary.json", summary)
    return summary


def _answer(run: Path, recipe: "Recipe", questions: Sequence[str]) -> list[str]:
    """Return the answers of the model of a stage."""
    from minimind.inference.generate import answer_all
    from minimind.inference.load import load_for_inference

    model, tokenizer = load_for_inference(run, recipe.device)
    if recipe.objective == "pretrain":
        return continue_as_dialogue(model, tokenizer, questions, _MAX_ANSWER_TOKENS)
    return answer_all(model, tokenizer, questions, max_new_tokens=_MAX_ANSWER_TOKENS)


def _score(question: str, answer: str) -> dict[str, bool]:
    """Score an answer by keywords, if the question is one of the textbook's."""
    from minimind.data.textbook import is_correct, quiz

    known = next((each for each in quiz() if each.question == question), None)
    return {"correct": is_correct(known, answer)} if known else {}


def show_results(out: Path, summary: dict[str, Any], recipes: "Mapping[str, Recipe]") -> None:
    """Print the answers, the metrics of the stages, and the commands to try next."""
    rows = summary["questions"]
    if rows:
        mark = {True: "✓", False: "✗", None: "–"}
        keys = [key for key in _ANSWER_KEYS.values() if key in rows[0]]
        cells = [
            [row["question"], *(row[key] for key in keys), mark[row.get("correct")]] for row in rows
        ]
        columns = ["question", *(key.replace("_", " ") for key in keys), "keywords"]
        console.show(console.table("Questions", columns, cells))
    console.show(console.table("Summary", ["metric", "value"], _summary_rows(summary), numbers=1))
    show_next_commands(out, last_adapter(out, recipes))


def last_adapter(out: Path, recipes: "Mapping[str, Recipe]") -> tuple[Path, Path] | None:
    """Return (model, adapter) of the last stage with LoRA; None if there is none."""
    adapters = [name for name, recipe in recipes.items() if recipe.lora]
    if not adapters:
        return None
    last_model = [name for name, recipe in recipes.items() if recipe.lora is None][-1]
    base = Path(recipes[adapters[-1]].model.init or "")
    return out if base == out / last_model else base, out / adapters[-1]


def _summary_rows(summary: dict[str, Any]) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = [
        ("parameters", summary["parameters"]),
        ("device", summary["device"]),
        ("training time, all stages", f"{summary['training_seconds']:,.0f} s"),
        ("total time", f"{summary['total_seconds']:,.0f} s"),
    ]
    for name, stage in summary["stages"].items():
        rows.append((f"{name}: tokens/s", round(stage["tokens_per_second"])))
        if "bits_per_byte" in stage:
            rows.append((f"{name}: bits per byte, held-out", round(stage["bits_per_byte"], 3)))
        if "accuracy" in stage:
            rows.append((f"{name}: preference accuracy", f"{stage['accuracy']:.1%}"))
    if summary["unigram_bits_per_byte"] is not None:
        unigram = round(summary["unigram_bits_per_byte"], 3)
        rows.append(("bits per byte, unigram model", unigram))
    return rows
