import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from minimind.errors import ResourceError
from minimind.evaluation.comparison import (
    as_page,
    build_comparison,
    category_rows,
    metric_rows,
    ranking_rows,
    write_comparison,
)
from minimind.evaluation.judge import make_trials, verdicts
from minimind.evaluation.open_ended import OpenEndedTask, Prompt
from minimind.evaluation.tasks import GenerationConfig
from minimind.reporting.render import to_html, to_markdown

PROMPTS = [
    Prompt("1", "甲？<b>粗</b>", "写作"),
    Prompt("2", "第一行\n| 第二行 |", "数学"),
    Prompt("3", "丙？", "数学", after=("2",)),
]
ANSWERS = {
    "one": {"1": "<script>alert(1)</script>", "2": "```\n好\n```", "3": "啊啊啊啊啊"},
    "t|wo": {"1": "# 好\x07", "2": "不"},
}


class Cells(HTMLParser):
    """The text of each table cell."""

    def __init__(self) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        if tag == "td":
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.cells:
            self.cells[-1] += data


@pytest.fixture
def task() -> OpenEndedTask:
    return OpenEndedTask("answers", PROMPTS, GenerationConfig(64))


def make(task: OpenEndedTask, *, judged: bool = False) -> dict[str, Any]:
    def result(name: str, text: str) -> dict[str, Any]:
        return {"id": name, "answer": text, "tokens": 3, "ended": name != "3", "seconds": 0.5}

    results = {
        model: {name: result(name, text) for name, text in texts.items()}
        for model, texts in ANSWERS.items()
    }
    results["t|wo"]["3"] = {"id": "3", "error": "it broke"}
    metrics = {
        model: task.summary([r for r in by_id.values() if "error" not in r])
        | {"failed": sum("error" in r for r in by_id.values())}
        for model, by_id in results.items()
    }
    if not judged:
        return build_comparison(task, results, metrics)
    trials = make_trials(PROMPTS, ANSWERS)
    judgements: dict[str, Any] = {
        t.id: {"id": t.id, "models": t.models, "scores": [80.0, 20.0], "reason": "<i>因为"}
        if t.prompt.id == "1"
        else {"id": t.id, "unreadable": "not JSON", "reply": "?"}
        for t in trials
    }
    verdict = {"name": "j", **verdicts(trials, judgements, list(ANSWERS))}
    return build_comparison(task, results, metrics, judge=verdict, trials=trials, judged=judgements)


def test_html_escapes_texts(task: OpenEndedTask) -> None:
    page = to_html(as_page(make(task, judged=True)))
    parser = Cells()
    parser.feed(page)
    assert not parser.tags & {"script", "i>因为"}
    cells = "\n".join(parser.cells)
    for text in (
        "甲？<b>粗</b>",
        "↳ 丙？",
        "<script>alert(1)</script>",
        "```\n好\n```",
        "# 好\ufffd",
        "<i>因为",
        "one: 80\nt|wo: 20",
        "(failed: it broke)",
        "(no verdict: not JSON)",
        "50.0% repeated, never ends)",
        "(score 50.0, 3 tokens",
    ):
        assert text in cells, text
    assert not re.search(r"(src|href)=|https?://|@import|url\(", page)


def test_markdown_escapes_texts(task: OpenEndedTask) -> None:
    text = to_markdown(as_page(make(task, judged=True)))
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) == 7  # cards, ranking, reasons, metrics, categories, answers per category
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert "(failed: it broke)" in text
    assert "<script>" not in text


def test_metrics_categories_and_ranking(task: OpenEndedTask) -> None:
    plain, judged = make(task), make(task, judged=True)
    rows = {row[0]: row[1:] for row in metric_rows(judged)}
    assert rows["answers"] == ["3", "2"]
    assert rows["failed"] == ["0", "1"]
    assert rows["tokens per second"] == ["6", "6"]
    assert rows["never end"][0].startswith("33.3% (")
    assert category_rows(judged) == [
        ["写作", "1", "50.0, 0.0% repeated", "50.0, 0.0% repeated"],
        ["数学", "2", "25.0% repeated", "0.0% repeated"],
    ]
    assert ranking_rows(plain) == []
    assert [row[:3] for row in ranking_rows(judged)] == [
        ["1 (1 – 1)", "one", "50.0 (50.0 – 50.0)"],
        ["1 (1 – 1)", "t|wo", "50.0 (50.0 – 50.0)"],
    ]
    assert "Ranking" not in to_html(as_page(plain))


def test_three_files_are_written(task: OpenEndedTask, tmp_path: Path) -> None:
    comparison = make(task)
    write_comparison(tmp_path / "out", comparison)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["compare.html", "compare.json", "compare.md"]
    written = json.loads((tmp_path / "out" / "compare.json").read_text("utf-8"))
    assert written["questions"][0]["answers"]["one"]["answer"] == ANSWERS["one"]["1"]
    assert written["questions"][2]["answers"]["t|wo"] == {"error": "it broke"}
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResourceError, match="cannot be written"):
        write_comparison(tmp_path / "file", comparison)
