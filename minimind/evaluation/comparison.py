"""Comparison of several models on the same questions, as JSON, Markdown and HTML.

compare.json   all answers and metrics, machine-readable
compare.md     a page to read, or to paste into an issue or a README
compare.html   the same as a self-contained page
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from minimind.errors import ResourceError
from minimind.evaluation.judge import Trial
from minimind.evaluation.open_ended import OpenEndedTask
from minimind.evaluation.tasks import Result
from minimind.files import write_atomically
from minimind.reporting.formatting import MISSING, format_percent
from minimind.reporting.page import Bar, Cell, Folded, Page, Table
from minimind.reporting.render import to_html, to_markdown

Metrics = Mapping[str, Any]

_ABOUT_TURNS = " ↳ marks a message after the one above it, in the same conversation."

_ABOUT_METRICS = (
    "Lengths are means over answers. Tokens per second is the throughput with eight questions at a "
    "time. Repeated: the fraction of an answer's 4-grams that occurred before in it. Never end: "
    "answers that the token limit cut off. Other script: answers whose main script differs from "
    "that of their question. Mixed scripts: answers with at least a tenth of their words in a "
    "script that is neither their main script nor in the question. Distinct-1 and distinct-2: "
    "distinct words and bigrams of all answers, divided by the number of words. In parentheses: "
    "95 % intervals."
)
_ABOUT_RANKING = (
    "The judge scores two answers at a time from 0 to 100, and again in swapped order. A pair "
    "counts if both replies could be parsed. Score: the mean. Wins: the fraction of comparisons in "
    "which an answer scored higher; ties count half. The 95 % intervals of score, wins and rank "
    "are from a bootstrap over questions, those of a conversation together."
)


def _format_count(value: float | None) -> str:
    return MISSING if value is None else f"{value:,.0f}"


def _percent_with_interval(name: str) -> Callable[[Metrics], str]:
    def cell(metrics: Metrics) -> str:
        if name not in metrics["intervals"]:
            return format_percent(metrics[name])
        low, high = metrics["intervals"][name]
        return f"{format_percent(metrics[name])} ({format_percent(low)} – {format_percent(high)})"

    return cell


_METRIC_ROWS: dict[str, Callable[[Metrics], str]] = {
    "answers": lambda m: f"{m['answers']:,}",
    "failed": lambda m: f"{m['failed']:,}",
    "tokens per answer": lambda m: _format_count(m["tokens"]),
    "characters per answer": lambda m: _format_count(m["characters"]),
    "tokens per second": lambda m: _format_count(m["tokens_per_second"]),
    "repeated": _percent_with_interval("repeated"),
    "never end": _percent_with_interval("never_end"),
    "empty": lambda m: format_percent(m["empty"]),
    "other script": lambda m: format_percent(m["other_script"]),
    "mixed scripts": lambda m: format_percent(m["mixed_scripts"]),
    "distinct-1": lambda m: format_percent(m["distinct_1"]),
    "distinct-2": lambda m: format_percent(m["distinct_2"]),
}
RANKING_COLUMNS: dict[str, Callable[[Metrics], str]] = {
    "rank": lambda r: f"{r['rank']} ({' – '.join(map(str, r['rank_interval']))})",
    "model": lambda r: r["model"],
    "score": lambda r: "{:.1f} ({:.1f} – {:.1f})".format(r["score"], *r["score_interval"]),
    "wins": lambda r: (
        MISSING
        if r["wins"] is None
        else "{} ({:.0%} – {:.0%})".format(format_percent(r["wins"]), *r["wins_interval"])
    ),
    "questions": lambda r: f"{r['questions']:,}",
}


def build_comparison(
    task: OpenEndedTask,
    results: Mapping[str, Mapping[str, Result]],
    metrics: Mapping[str, Metrics],
    *,
    judge: Metrics | None = None,
    trials: Sequence[Trial] = (),
    judged: Mapping[str, Result] | None = None,
) -> dict[str, Any]:
    """Return the comparison as JSON.

    results: by model and question id. metrics: by model. judge: the judge's name and metrics.
    judged: the judge's replies, by trial id.
    """
    judged = judged or {}
    replies: dict[str, list[dict[str, Any]]] = {}
    for trial in trials:
        if trial.id in judged:
            reply = {key: value for key, value in judged[trial.id].items() if key != "id"}
            replies.setdefault(trial.prompt.id, []).append({"models": trial.models} | reply)
    return {
        "settings": task.settings(),
        "models": dict(metrics),
        "judge": judge,
        "questions": [
            {
                "id": prompt.id,
                "question": prompt.question,
                "category": prompt.category,
                "after": prompt.after,
                "answers": {
                    model: task.with_metrics(by_id[prompt.id])
                    for model, by_id in results.items()
                    if prompt.id in by_id
                },
                "judged": replies.get(prompt.id, []),
            }
            for prompt in task.prompts.values()
        ],
    }


def write_comparison(folder: Path, comparison: Mapping[str, Any]) -> None:
    """Write compare.json, .md and .html to a folder. Raises ResourceError if that fails."""
    page = as_page(comparison)
    files = {
        "compare.json": json.dumps(comparison, ensure_ascii=False, indent=1) + "\n",
        "compare.md": to_markdown(page),
        "compare.html": to_html(page),
    }
    for name, text in files.items():
        try:
            write_atomically(folder / name, text)
        except OSError as error:
            raise ResourceError(f"{folder / name}: cannot be written: {error.strerror}") from error


def metric_rows(comparison: Mapping[str, Any]) -> list[list[str]]:
    """Return a row per metric, with a column per model."""
    models = comparison["models"].values()
    return [[name, *map(cell, models)] for name, cell in _METRIC_ROWS.items()]


def ranking_rows(comparison: Mapping[str, Any]) -> list[list[str]]:
    """Return the ranking, best first, with RANKING_COLUMNS; empty without a judge."""
    judge = comparison["judge"] or {"ranking": []}
    return [[cell(row) for cell in RANKING_COLUMNS.values()] for row in judge["ranking"]]


def category_rows(comparison: Mapping[str, Any]) -> list[list[str]]:
    """Return rows of category, questions, and a summary per model; empty for one category."""
    by_category: dict[str, list[Metrics]] = {}
    for question in comparison["questions"]:
        by_category.setdefault(question["category"], []).append(question)
    if len(by_category) < 2:
        return []
    scores = (comparison["judge"] or {}).get("by_question", {})

    def cell(model: str, questions: Sequence[Metrics]) -> str:
        answers = [question["answers"].get(model, {"error": ""}) for question in questions]
        answers = [answer for answer in answers if "error" not in answer]
        if not answers:
            return MISSING
        repeated = f"{format_percent(fmean(answer['repeated'] for answer in answers))} repeated"
        model_scores = [
            scores[question["id"]][model]
            for question in questions
            if model in scores.get(question["id"], {})
        ]
        return f"{fmean(model_scores):.1f}, {repeated}" if model_scores else repeated

    return [
        [
            name or MISSING,
            f"{len(questions):,}",
            *(cell(model, questions) for model in comparison["models"]),
        ]
        for name, questions in by_category.items()
    ]


def describe_judge(judge: Metrics) -> str:
    """Describe the judge's reliability: parsed replies, consistency, and position bias."""
    text = (
        f"{judge['name']}: {judge['read']:,} of {judge['trials']:,} replies could be parsed, "
        f"{judge['unreadable']:,} were not the requested JSON"
    )
    if judge["failed"]:
        text += f", {judge['failed']:,} requests failed"
    if "position_consistency" in judge:
        low, high = judge["position_consistency_interval"]
        text += (
            f". Position consistency: {format_percent(judge['position_consistency'])} "
            f"({low:.0%} – {high:.0%}) of {judge['pairs']:,} pairs got the same verdict in both "
            "orders"
        )
        if judge["first_preferred"] is not None:
            text += f"; the first answer was preferred {format_percent(judge['first_preferred'])}"
            text += " of the time"
    return text + "."


def describe_settings(comparison: Mapping[str, Any]) -> str:
    """Describe the decoding settings."""
    settings = comparison["settings"]
    sampling = (
        f"temperature {settings['temperature']:g}, seed {settings['seed']}"
        if settings["temperature"]
        else "greedy decoding"
    )
    return f"{sampling}, up to {settings['max_new_tokens']:,} tokens per answer"


def describe_answer(answer: Metrics) -> list[str]:
    """Describe the metrics of one answer; problems come last."""
    length = f"{answer['characters']:,} characters"
    parts = [length if answer["tokens"] is None else f"{answer['tokens']:,} tokens, {length}"]
    problems = {
        f"{format_percent(answer['repeated'])} repeated": answer["repeated"] > 0,
        "never ends": answer["never_ends"],
        "empty": answer["empty"],
        "other script": answer["other_script"],
        "mixed scripts": answer["mixed_scripts"],
    }
    return parts + [problem for problem, occurs in problems.items() if occurs]


def as_page(comparison: Mapping[str, Any]) -> Page:
    """Return the comparison as a page."""
    models, judge = list(comparison["models"]), comparison["judge"]
    cards = {"models": f"{len(models):,}", "questions": f"{len(comparison['questions']):,}"}
    page = Page(", ".join(models), f"Model comparison: {describe_settings(comparison)}.", cards)
    if judge:
        if "position_consistency" in judge:
            cards["position consistency"] = format_percent(judge["position_consistency"])
        cards["replies unreadable"] = f"{judge['unreadable']:,}"
        pairs = zip(ranking_rows(comparison), judge["ranking"], strict=True)
        ranking: list[list[Cell]] = [[*row, Bar(entry["score"] / 100)] for row, entry in pairs]
        verdicts = Table(
            ("question", "models in the order shown", "reason"),
            _verdict_rows(comparison),
            kind="texts",
        )
        page.add(
            "Ranking",
            f"{describe_judge(judge)} {_ABOUT_RANKING}",
            Table([*RANKING_COLUMNS, "0 – 100"], ranking, numbers=(2, 3, 4)),
            Folded("The judge's reasons", verdicts),
        )
    numbers = range(1, len(models) + 1)
    page.add("Metrics", _ABOUT_METRICS, Table(["", *models], metric_rows(comparison), numbers))
    head = ["category", "questions", *models]
    page.add(
        "By category",
        "The judge's score and the repeated fraction." if judge else "The repeated fraction.",
        Table(head, category_rows(comparison), range(1, len(head))),
    )
    page.add(
        "Answers",
        "The answers of each model."
        + _ABOUT_TURNS * any(q["after"] for q in comparison["questions"]),
        *_answer_tables(comparison),
    )
    return page


def _answer_tables(comparison: Mapping[str, Any]) -> list[Table | Folded]:
    """Return one table, or a folded table per category."""
    scores = (comparison["judge"] or {}).get("by_question", {})
    by_category: dict[str, list[list[str]]] = {}
    for question in comparison["questions"]:
        answers, by_model = question["answers"], scores.get(question["id"], {})
        cells = [_answer_cell(answers.get(m), by_model.get(m)) for m in comparison["models"]]
        by_category.setdefault(question["category"], []).append([mark_turn(question), *cells])
    head = ["question", *comparison["models"]]
    if len(by_category) == 1:
        return [Table(head, rows, kind="texts") for rows in by_category.values()]
    return [
        Folded(f"{name or MISSING}: {len(rows):,}", Table(head, rows, kind="texts"))
        for name, rows in by_category.items()
    ]


def mark_turn(question: Metrics) -> str:
    """Return the text of a question, marked if it continues a conversation."""
    return f"↳ {question['question']}" if question["after"] else question["question"]


def _answer_cell(answer: Metrics | None, score: float | None) -> str:
    if answer is None:
        return "(not answered yet)"
    if "error" in answer:
        return f"(failed: {answer['error']})"
    parts = describe_answer(answer)
    if score is not None:
        parts.insert(0, f"score {score:.1f}")
    return f"{answer['answer']}\n\n({', '.join(parts)})"


def _verdict_rows(comparison: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for question in comparison["questions"]:
        for reply in question["judged"]:
            models, scores = reply["models"], reply.get("scores", ())
            lines = [f"{model}: {score:g}" for model, score in zip(models, scores, strict=False)]
            reason = reply.get("reason") or f"(no verdict: {reply.get('unreadable', 'failed')})"
            rows.append([mark_turn(question), "\n".join(lines or models), reason])
    return rows
