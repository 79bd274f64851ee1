"""Several models' answers to the same questions side by side: figures, Markdown and a page.

compare.json   all of it, for programs
compare.md     the same to read, to paste into an issue or a README
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
from minimind.reporting.pages import Bar, Cell, Folded, Page, Table, to_html, to_markdown

Metrics = Mapping[str, Any]

_SAID = ("question", "answers as they were shown", "reason")
_EXPLAINED = (
    "Lengths are means. Speed is that of all questions together, eight at a time. Repeated: the "
    "share of 4-grams that an answer holds a second time or more. Never end: answers that the "
    "longest allowed length cut off. Other script: answers mostly in another script than their "
    "question. Mixed: answers with a tenth or more of their words in a script that is neither "
    "their own nor the question's. Distinct: different words, and pairs of neighbouring words, of "
    "all answers, over the number of words. In brackets: 95 % intervals."
)
_JUDGED = (
    "The judge sees two answers at a time, scores each from 0 to 100, and is asked again with the "
    "sides swapped; a pair counts once both replies could be read. Score: the mean. Wins: the "
    "share of comparisons in which an answer scored higher, ties half. Intervals, of 95 %, are "
    "over questions drawn again; a rank's says which places the model may as well have."
)


def share(value: float | None) -> str:
    """0.1234 as 12.3%."""
    return "–" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _with_interval(name: str) -> Callable[[Metrics], str]:
    def cell(metrics: Metrics) -> str:
        if name not in metrics["intervals"]:
            return share(metrics[name])
        low, high = metrics["intervals"][name]
        return f"{share(metrics[name])} ({share(low)} – {share(high)})"

    return cell


_FIGURES: dict[str, Callable[[Metrics], str]] = {
    "answers": lambda f: f"{f['answers']:,}",
    "failed": lambda f: f"{f['failed']:,}",
    "tokens an answer": lambda f: _number(f["tokens"]),
    "characters an answer": lambda f: _number(f["characters"]),
    "tokens a second": lambda f: _number(f["tokens_per_second"]),
    "repeated": _with_interval("repeated"),
    "never end": _with_interval("never_end"),
    "empty": lambda f: share(f["empty"]),
    "other script": lambda f: share(f["other_script"]),
    "mixed scripts": lambda f: share(f["mixed_scripts"]),
    "distinct-1": lambda f: share(f["distinct_1"]),
    "distinct-2": lambda f: share(f["distinct_2"]),
}
RANKING: dict[str, Callable[[Metrics], str]] = {
    "rank": lambda r: f"{r['rank']} ({' – '.join(map(str, r['rank_interval']))})",
    "model": lambda r: r["model"],
    "score": lambda r: "{:.1f} ({:.1f} – {:.1f})".format(r["score"], *r["score_interval"]),
    "wins": lambda r: (
        "–"
        if r["wins"] is None
        else "{} ({:.0%} – {:.0%})".format(share(r["wins"]), *r["wins_interval"])
    ),
    "questions": lambda r: f"{r['questions']:,}",
}


def compared(
    talk: OpenEndedTask,
    results: Mapping[str, Mapping[str, Result]],
    metrics: Mapping[str, Metrics],
    *,
    judge: Metrics | None = None,
    trials: Sequence[Trial] = (),
    judged: Mapping[str, Result] | None = None,
) -> dict[str, Any]:
    """All that is shown, as JSON.

    results: by model, by question; figures: by model. judge: its name and its verdicts.
    """
    said = judged or {}
    reasons: dict[str, list[dict[str, Any]]] = {}
    for trial in trials:
        if trial.id in said:
            told = {key: value for key, value in said[trial.id].items() if key != "id"}
            reasons.setdefault(trial.prompt.id, []).append({"models": trial.models} | told)
    return {
        "settings": talk.settings(),
        "models": dict(metrics),
        "judge": judge,
        "questions": [
            {
                "id": prompt.id,
                "question": prompt.question,
                "category": prompt.category,
                "answers": {
                    model: talk.described(some[prompt.id])
                    for model, some in results.items()
                    if prompt.id in some
                },
                "judged": reasons.get(prompt.id, []),
            }
            for prompt in talk.prompts.values()
        ],
    }


def write_comparison(folder: Path, comparison: Mapping[str, Any]) -> None:
    """The three files. Raises ResourceError when they cannot be written."""
    page = as_page(comparison)
    files = {
        "compare.json": json.dumps(comparison, ensure_ascii=False, indent=1) + "\n",
        "compare.md": to_markdown(page, "", {}),
        "compare.html": to_html(page),
    }
    for name, text in files.items():
        try:
            write_atomically(folder / name, text)
        except OSError as error:
            raise ResourceError(f"{folder / name}: cannot be written: {error.strerror}") from error


def metric_rows(comparison: Mapping[str, Any]) -> list[list[str]]:
    """A row a figure, a column a model."""
    models = comparison["models"].values()
    return [[name, *map(cell, models)] for name, cell in _FIGURES.items()]


def ranking_rows(comparison: Mapping[str, Any]) -> list[list[str]]:
    """The best first, for the columns of RANKING; none without a judge."""
    judge = comparison["judge"] or {"ranking": []}
    return [[cell(row) for cell in RANKING.values()] for row in judge["ranking"]]


def category_rows(comparison: Mapping[str, Any]) -> list[list[str]]:
    """(category, questions, and for each model what is known); none where there is but one."""
    groups: dict[str, list[Metrics]] = {}
    for one in comparison["questions"]:
        groups.setdefault(one["category"], []).append(one)
    if len(groups) < 2:
        return []
    scores = (comparison["judge"] or {}).get("by_question", {})

    def cell(model: str, some: Sequence[Metrics]) -> str:
        answers = [one["answers"].get(model, {"error": ""}) for one in some]
        answers = [answer for answer in answers if "error" not in answer]
        if not answers:
            return "–"
        told = f"{share(fmean(answer['repeated'] for answer in answers))} repeated"
        own = [scores[one["id"]][model] for one in some if model in scores.get(one["id"], {})]
        return f"{fmean(own):.1f}, {told}" if own else told

    return [
        [name or "–", f"{len(some):,}", *(cell(model, some) for model in comparison["models"])]
        for name, some in groups.items()
    ]


def describe_judge(judge: Metrics) -> str:
    """How far it can be trusted, in words."""
    told = (
        f"{judge['name']}: {judge['read']:,} of {judge['trials']:,} replies could be read, "
        f"{judge['unreadable']:,} were not the JSON that was asked for"
    )
    if judge["failed"]:
        told += f", {judge['failed']:,} did not come"
    if "agreement" in judge:
        low, high = judge["agreement_interval"]
        told += (
            f". Of {judge['pairs']:,} pairs {share(judge['agreement'])} ({low:.0%} – {high:.0%}) "
            "were decided alike both ways round"
        )
        if judge["first_preferred"] is not None:
            told += f"; the answer shown first was preferred {share(judge['first_preferred'])}"
            told += " of the time"
    return told + "."


def describe_settings(comparison: Mapping[str, Any]) -> str:
    """How was asked, in words."""
    settings = comparison["settings"]
    how = (
        f"temperature {settings['temperature']:g}, seed {settings['seed']}"
        if settings["temperature"]
        else "greedy"
    )
    return f"{how}, up to {settings['max_new_tokens']:,} tokens an answer"


def describe_answer(answer: Metrics) -> list[str]:
    """The figures of one answer in words; those that are bad news last."""
    length = f"{answer['characters']:,} characters"
    told = [length if answer["tokens"] is None else f"{answer['tokens']:,} tokens, {length}"]
    flags = {
        f"{share(answer['repeated'])} repeated": answer["repeated"] > 0,
        "never ends": answer["never_ends"],
        "empty": answer["empty"],
        "other script": answer["other_script"],
        "mixed scripts": answer["mixed_scripts"],
    }
    return told + [flag for flag, raised in flags.items() if raised]


def as_page(comparison: Mapping[str, Any]) -> Page:
    """All of it, to be drawn."""
    models, judge = list(comparison["models"]), comparison["judge"]
    cards = {"models": f"{len(models):,}", "questions": f"{len(comparison['questions']):,}"}
    page = Page(", ".join(models), f"Side by side: {describe_settings(comparison)}.", cards)
    if judge:
        if "agreement" in judge:
            cards["decided alike both ways"] = share(judge["agreement"])
        cards["replies unreadable"] = f"{judge['unreadable']:,}"
        pairs = zip(ranking_rows(comparison), judge["ranking"], strict=True)
        ranking: list[list[Cell]] = [[*row, Bar(one["score"] / 100)] for row, one in pairs]
        page.add(
            "Ranking",
            f"{describe_judge(judge)} {_JUDGED}",
            Table([*RANKING, "0 – 100"], ranking, numbers=(2, 3, 4)),
            Folded("What the judge said", Table(_SAID, _reasons(comparison), kind="texts")),
        )
    numbers = range(1, len(models) + 1)
    page.add("Metrics", _EXPLAINED, Table(["", *models], metric_rows(comparison), numbers))
    head = ["category", "questions", *models]
    page.add(
        "By category",
        "What is repeated by kind of question" + (", after the judge's score." if judge else "."),
        Table(head, category_rows(comparison), range(1, len(head))),
    )
    page.add(
        "Answers",
        "The same questions to each model, each in a conversation of its own.",
        *_answers(comparison),
    )
    return page


def _answers(comparison: Mapping[str, Any]) -> list[Table | Folded]:
    """A table; where there are categories one each, folded."""
    scores = (comparison["judge"] or {}).get("by_question", {})
    groups: dict[str, list[list[str]]] = {}
    for one in comparison["questions"]:
        own = scores.get(one["id"], {})
        cells = [_answer(one["answers"].get(m), own.get(m)) for m in comparison["models"]]
        groups.setdefault(one["category"], []).append([one["question"], *cells])
    head = ["question", *comparison["models"]]
    if len(groups) == 1:
        return [Table(head, rows, kind="texts") for rows in groups.values()]
    return [
        Folded(f"{name or '–'}: {len(rows):,}", Table(head, rows, kind="texts"))
        for name, rows in groups.items()
    ]


def _answer(answer: Metrics | None, score: float | None) -> str:
    if answer is None:
        return "(not asked yet)"
    if "error" in answer:
        return f"(failed: {answer['error']})"
    told = describe_answer(answer)
    if score is not None:
        told.insert(0, f"score {score:.1f}")
    return f"{answer['answer']}\n\n({', '.join(told)})"


def _reasons(comparison: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for one in comparison["questions"]:
        for said in one["judged"]:
            models, scores = said["models"], said.get("scores", ())
            told = [f"{model}: {score:g}" for model, score in zip(models, scores, strict=False)]
            reason = said.get("reason") or f"(no verdict: {said.get('unreadable', 'failed')})"
            rows.append([one["question"], "\n".join(told or models), reason])
    return rows
