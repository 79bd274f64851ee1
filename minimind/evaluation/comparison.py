"""Several models' answers to the same questions side by side: figures, Markdown and a page.

compare.json   all of it, for programs
compare.md     the same to read, to paste into an issue or a README
compare.html   the same as a self-contained page
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from minimind.errors import ResourceError
from minimind.evaluation.judge import Trial
from minimind.evaluation.prompts import Talk
from minimind.evaluation.report import _STYLE, _folded, _table, _text
from minimind.evaluation.tasks import Result

Figures = Mapping[str, Any]

_MORE_STYLE = """
.mini { font-size: .8rem; opacity: .8; white-space: normal; margin-top: .3rem; }
.said { max-height: 18rem; overflow-y: auto; }
.texts td:first-child { font-weight: 600; }
.texts details { font-weight: 400; padding: .1rem .5rem; font-size: .85rem; }
.span { position: relative; height: .9rem; min-width: 10rem; background: var(--soft);
        border-radius: .3rem; margin-top: .35rem; }
.span i { position: absolute; height: 100%; border-radius: .3rem; background: #3b8ad880; }
.span b { position: absolute; width: 3px; height: 100%; margin-left: -1.5px; background: #3b8ad8; }
"""
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


def _with_interval(name: str) -> Callable[[Figures], str]:
    def cell(figures: Figures) -> str:
        if name not in figures["intervals"]:
            return share(figures[name])
        low, high = figures["intervals"][name]
        return f"{share(figures[name])} ({low:.0%} – {high:.0%})"

    return cell


_FIGURES: dict[str, Callable[[Figures], str]] = {
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
RANKING: dict[str, Callable[[Figures], str]] = {
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
    talk: Talk,
    results: Mapping[str, Mapping[str, Result]],
    figures: Mapping[str, Figures],
    *,
    judge: Figures | None = None,
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
        "models": dict(figures),
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
    files = {
        "compare.json": json.dumps(comparison, ensure_ascii=False, indent=1) + "\n",
        "compare.md": as_markdown(comparison),
        "compare.html": as_page(comparison),
    }
    for name, text in files.items():
        part = folder / f"{name}.part"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            part.write_bytes(text.encode("utf-8", "replace"))
            os.replace(part, folder / name)
        except OSError as error:
            raise ResourceError(f"{folder / name}: cannot be written: {error.strerror}") from error


def figure_rows(comparison: Mapping[str, Any]) -> list[list[str]]:
    """A row a figure, a column a model."""
    models = comparison["models"].values()
    return [[name, *map(cell, models)] for name, cell in _FIGURES.items()]


def ranking_rows(comparison: Mapping[str, Any]) -> list[list[str]]:
    """The best first, for the columns of RANKING; none without a judge."""
    judge = comparison["judge"] or {"ranking": []}
    return [[cell(row) for cell in RANKING.values()] for row in judge["ranking"]]


def category_rows(comparison: Mapping[str, Any]) -> list[list[str]]:
    """(category, questions, and for each model what is known); none where there is but one."""
    groups: dict[str, list[Figures]] = {}
    for one in comparison["questions"]:
        groups.setdefault(one["category"], []).append(one)
    if len(groups) < 2:
        return []
    scores = (comparison["judge"] or {}).get("by_question", {})

    def cell(model: str, some: Sequence[Figures]) -> str:
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


def about_judge(judge: Figures) -> str:
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


def settings_told(comparison: Mapping[str, Any]) -> str:
    """How was asked, in words."""
    settings = comparison["settings"]
    how = (
        f"temperature {settings['temperature']:g}, seed {settings['seed']}"
        if settings["temperature"]
        else "greedy"
    )
    return f"{how}, up to {settings['max_new_tokens']:,} tokens an answer"


def answer_told(answer: Figures) -> list[str]:
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


def as_markdown(comparison: Mapping[str, Any]) -> str:
    """All of it."""
    models = list(comparison["models"])
    number = len(comparison["questions"])
    parts = [
        f"# {', '.join(map(_inline, models))}",
        f"{number:,} question{'s' * (number != 1)}, {settings_told(comparison)}.",
        _markdown_table(["", *models], figure_rows(comparison)),
        _EXPLAINED,
    ]
    if comparison["judge"]:
        parts += ["## Ranking", _markdown_table(list(RANKING), ranking_rows(comparison))]
        parts += [_inline(about_judge(comparison["judge"])), _JUDGED]
    if rows := category_rows(comparison):
        head = ["category", "questions", *models]
        parts += ["## By category", _markdown_table(head, rows)]
    parts.append("## Answers")
    scores = (comparison["judge"] or {}).get("by_question", {})
    for place, one in enumerate(comparison["questions"], start=1):
        parts += [f"### {place}", _quoted(one["question"])]
        for model, answer in one["answers"].items():
            if "error" in answer:
                parts.append(f"**{_inline(model)}** failed: {_inline(answer['error'])}")
                continue
            told = answer_told(answer)
            if model in scores.get(one["id"], {}):
                told.insert(0, f"score {scores[one['id']][model]:.1f}")
            parts += [f"**{_inline(model)}** ({', '.join(told)})", _fenced(answer["answer"])]
    return "\n\n".join(filter(None, parts)) + "\n"


def _markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_inline, line))} |" for line in lines)


def _inline(text: str) -> str:
    """Text that stays text on one line of Markdown."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))


def _quoted(text: str) -> str:
    return "\n".join(f"> {_inline(line)}  " for line in text.splitlines())


def _fenced(text: str) -> str:
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def as_page(comparison: Mapping[str, Any]) -> str:
    """All of it, self-contained."""
    models = list(comparison["models"])
    judge = comparison["judge"]
    cards = {
        "models": f"{len(models):,}",
        "questions": f"{len(comparison['questions']):,}",
    }
    sections = [
        (
            "Figures",
            _EXPLAINED,
            _table(
                ["", *models],
                ([_text(cell) for cell in row] for row in figure_rows(comparison)),
                numbers=range(1, len(models) + 1),
            ),
        )
    ]
    if judge:
        if "agreement" in judge:
            cards["decided alike both ways"] = share(judge["agreement"])
        cards["replies unreadable"] = f"{judge['unreadable']:,}"
        sections.insert(0, ("Ranking", f"{about_judge(judge)} {_JUDGED}", _ranking(comparison)))
    if rows := category_rows(comparison):
        told = (
            "The judge's mean score, and what is repeated."
            if judge
            else "The share that is repeated, by kind of question."
        )
        head = ["category", "questions", *models]
        cells = ([_text(cell) for cell in row] for row in rows)
        numbers = range(1, len(head))
        sections.append(("By category", told, _table(head, cells, numbers=numbers)))
    told = "The same questions to each model, each in a conversation of its own."
    sections.append(("Answers", told, _answers(comparison)))
    drawn = "".join(
        f"<div class=card>{_text(name)}<b>{_text(value)}</b></div>" for name, value in cards.items()
    )
    body = "\n".join(
        f"<h2>{name}</h2><p class=faint>{_text(explanation)}</p>{content}"
        for name, explanation, content in sections
        if content
    )
    title = _text(", ".join(models))
    return (
        '<!doctype html><html lang="zh-Hans"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}{_MORE_STYLE}</style>"
        f"<h1>{title}</h1><p class=faint>Side by side: {_text(settings_told(comparison))}.</p>"
        f"<div class=cards>{drawn}</div>{body}</html>\n"
    )


def _ranking(comparison: Mapping[str, Any]) -> str:
    rows = []
    for row, one in zip(ranking_rows(comparison), comparison["judge"]["ranking"], strict=True):
        low, high = one["score_interval"]
        drawing = (
            f"<div class=span><i style='left:{low:.1f}%;width:{high - low:.1f}%'></i>"
            f"<b style='left:{one['score']:.1f}%'></b></div>"
        )
        rows.append([*map(_text, row), drawing])
    return _table([*RANKING, "0 – 100"], rows, numbers=(2, 3, 4))


def _answers(comparison: Mapping[str, Any]) -> str:
    """A table; where there are categories one each, folded."""
    groups: dict[str, list[list[str]]] = {}
    scores = (comparison["judge"] or {}).get("by_question", {})
    for one in comparison["questions"]:
        cells = [
            _answer(one["answers"].get(model), scores.get(one["id"], {}).get(model))
            for model in comparison["models"]
        ]
        row = [_text(one["question"]) + _reasons(one["judged"]), *cells]
        groups.setdefault(one["category"], []).append(row)
    head = ["question", *comparison["models"]]
    tables = {name: _table(head, rows, kind="texts") for name, rows in groups.items()}
    if len(tables) == 1:
        return next(iter(tables.values()))
    return "".join(
        _folded(f"{name or '–'}: {len(groups[name]):,}", table) for name, table in tables.items()
    )


def _answer(answer: Figures | None, score: float | None) -> str:
    if answer is None:
        return "<div class=mini>not asked yet</div>"
    if "error" in answer:
        return f"<div class='mini wrong'>failed: {_text(answer['error'])}</div>"
    length, *flags = map(_text, answer_told(answer))
    told = [length] if score is None else [f"<b>{score:.1f}</b>", length]
    told += [f"<span class=wrong>{flag}</span>" for flag in flags]
    said = f"<div class=said>{_text(answer['answer'])}</div>"
    return f"{said}<div class=mini>{' · '.join(told)}</div>"


def _reasons(judged: Sequence[Figures]) -> str:
    lines = []
    for one in judged:
        if "scores" in one:
            pairs = zip(one["models"], one["scores"], strict=True)
            told = ", ".join(f"{_text(model)} {score:g}" for model, score in pairs)
            lines.append(f"<p><b>{told}.</b> {_text(one['reason'])}</p>")
        else:
            told = _text(", ".join(one["models"]))
            why = _text(one.get("unreadable") or one.get("error"))
            lines.append(f"<p><b>{told}:</b> no verdict: {why}</p>")
    return f"<details><summary>judge</summary>{''.join(lines)}</details>" if lines else ""
