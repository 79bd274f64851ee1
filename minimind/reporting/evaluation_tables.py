"""Sections with results of `minimind eval` and of the demo's quiz."""

from collections.abc import Mapping, Sequence

from minimind.reporting.formatting import MISSING, format_metric, number_of
from minimind.reporting.page import Bar, Cell, Folded, Page, Table, Title
from minimind.reporting.runs import Metrics


def add_benchmarks(page: Page, benchmarks: Sequence[Metrics]) -> None:
    """Add results of `minimind eval`, with groups of subjects where a benchmark has them."""
    head = ["model", "task", "score", "95 %", "chance", "correct / questions", "fluent", "failed"]
    rows = [_benchmark_row(metrics) for metrics in benchmarks]
    groups: list[Title | Table] = []
    for metrics in benchmarks:
        by_group = metrics.get("by_group")
        if isinstance(by_group, dict) and by_group:
            groups.append(Title(f"{metrics['model']}: {metrics['task']}"))
            counts = {
                name: (
                    int(number_of(group, "correct") or 0),
                    int(number_of(group, "questions") or 0),
                )
                for name, group in by_group.items()
            }
            groups.append(_bars("group", counts))
    page.add(
        "Benchmarks",
        "Results of minimind eval. Scores whose 95 % intervals overlap do not clearly differ. "
        "Chance is the accuracy of random guessing.",
        Table(head, rows, range(2, 8)),
        *groups,
    )


def _benchmark_row(metrics: Metrics) -> list[Cell]:
    low, high = metrics.get("interval") or (None, None)
    if metrics.get("documents") == 1:  # a single document has no interval
        low = high = None
    bits, accuracy = number_of(metrics, "bits_per_byte"), number_of(metrics, "accuracy")
    if bits is not None:
        score = f"{bits:.4f} bits/byte"
        interval = MISSING if low is None else f"{low:.4f} – {high:.4f}"
        counts = f"{format_metric(metrics, 'documents', ',.0f')} documents"
    elif accuracy is not None:
        score = f"{accuracy:.2%}"
        interval = MISSING if low is None else f"{low:.1%} – {high:.1%}"
        correct, questions = number_of(metrics, "correct"), number_of(metrics, "questions")
        counts = f"{correct or 0:,.0f} / {questions or 0:,.0f}"
    else:
        scores = metrics.get("metrics") or {}
        score = ", ".join(f"{name} {format_metric(scores, name, '.4g')}" for name in scores)
        score, interval, counts = score or MISSING, MISSING, MISSING
    return [
        str(metrics["model"]),
        str(metrics["task"]),
        score,
        interval,
        format_metric(metrics, "chance", ".1%"),
        counts,
        format_metric(metrics, "fluent", ",.0f"),
        format_metric(metrics, "failed", ",.0f"),
    ]


def _bars(name: str, counts: Mapping[str, tuple[int, int]]) -> Table:
    """Return a table of accuracies as bars, lowest first. counts: (right answers, questions)."""
    ordered = sorted(counts.items(), key=lambda item: item[1][0] / max(item[1][1], 1))
    rows: list[list[Cell]] = []
    for group, (right, questions) in ordered:
        fraction = right / max(questions, 1)
        rows.append([group, Bar(fraction), f"{right}/{questions}", f"{fraction:.0%}"])
    return Table([name, "", "right", ""], rows, (2, 3))


def add_demo_answers(page: Page, demo: Metrics, suffix: str = "") -> None:
    """Add the questions of a demo or road, answered after each stage. suffix: end of the title."""
    rows = demo.get("questions", [])
    titles = {
        "before_training": "before training",
        "after_pretraining": "after pretraining",
        "after_fine_tuning": "after fine-tuning",
        "after_preferences": "after preferences",
    }
    stages = [key for key in titles if any(key in row for row in rows)]
    marks = [key for key in _MARKS if any(key in row for row in rows)]
    cells: list[list[Cell]] = [
        [
            *(str(row.get(key, "")) for key in ("question", *stages)),
            *(bool(row[key]) if key in row else MISSING for key in marks),
        ]
        for row in rows
    ]
    head = ["question", *(titles[key] for key in stages), *(_MARKS[key][0] for key in marks)]
    page.add(
        f"Answers after each stage{suffix}",
        " ".join(
            ["The same questions after each stage."]
            + [_ABOUT_STAGES[key] for key in stages if key in _ABOUT_STAGES]
            + [_MARKS[key][1] for key in marks]
        ),
        Table(head, cells, kind="texts"),
    )


_ABOUT_STAGES = {
    "before_training": "Before training the model writes noise.",
    "after_pretraining": "After pretraining it knows words, but rarely the answer.",
    "after_fine_tuning": "After fine-tuning it should answer in one complete sentence.",
    "after_preferences": "Preference optimization should keep that.",
}
_MARKS = {  # the title of the column, and its meaning
    "correct": (
        "keywords",
        "Keywords: the last answer contains the keywords of a right answer and none of a wrong "
        "one.",
    ),
    "fluent": ("fluent", "Fluent: it is built like the textbook's sentences."),
}


def add_demo_quiz(page: Page, demo: Metrics, suffix: str = "") -> None:
    """Add the demo's quiz by subject, and the answers of its LoRA adapter.

    suffix: end of the titles.
    """
    quiz = demo.get("quiz", {})
    by_subject = {
        name: (subject["correct"], subject["questions"])
        for name, subject in quiz.get("by_subject", {}).items()
    }
    fluent = f"; {quiz['fluent']} answers are fluent" if "fluent" in quiz else ""
    head = ["question", "answer", "expected"]
    wrong: list[list[Cell]] = [[str(row[key]) for key in head] for row in quiz.get("wrong", [])]
    page.add(
        f"Quiz by subject{suffix}",
        "Questions in wordings that were not trained on, scored by keywords, the weakest subject "
        f"first{fluent}. A short bar shows what the model has not learned.",
        _bars("subject", by_subject),
        Folded(f"{len(wrong):,} wrong answers", Table(head, wrong, kind="texts"))
        if wrong
        else None,
    )
    answers: list[list[Cell]] = [
        [*(str(row[key]) for key in ("question", "before", "after")), bool(row["right"])]
        for row in demo.get("identity", {}).get("answers", [])
    ]
    page.add(
        f"A new name{suffix}",
        "Questions about the model's identity, in wordings that were not trained on, without and "
        "with the LoRA adapter that was trained to change it. ✓ marks an answer with the name or "
        "the author that the question is about.",
        Table(["question", "without the adapter", "with the adapter", ""], answers, kind="texts"),
    )
