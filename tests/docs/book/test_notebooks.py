"""Notebooks of the chapters: their structure, and a run of all their cells."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from docs.book.chapters import LANGUAGES, Chapter, cell_names, chapters, solutions

ROOT = Path(__file__).parents[3]
CHAPTERS = [pytest.param(chapter, id=chapter.stem) for chapter in chapters()]


def code_cells(chapter: Chapter, lang: str) -> list[str]:
    """Return the source of each code cell."""
    content = json.loads(chapter.notebook(lang).read_text("utf-8"))
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_both_notebooks_have_the_cells_figures_and_solutions(chapter: Chapter) -> None:
    english, chinese = (code_cells(chapter, lang) for lang in LANGUAGES)
    assert [c.replace("Solution", "") for c in english] == [
        c.replace("参考解答", "") for c in chinese
    ]
    figures = {path.name.partition(".")[0] for path in chapter.outputs.glob("*.svg")}
    num_solutions = sum(map(len, solutions(chapter)))
    expected = len(cell_names(chapter.folder / "chapter.py")) + len(figures) + num_solutions
    assert len(english) == expected
    for lang in LANGUAGES:
        text = chapter.notebook(lang).read_text("utf-8")
        assert "--8<--" not in text and "<!--=" not in text and "<details" not in text


def test_cells_use_no_name_that_only_hidden_code_defines() -> None:
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821"]
    done = subprocess.run([*ruff, ROOT / "notebooks/book"], capture_output=True, text=True)
    assert not done.returncode, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("lang", LANGUAGES)
@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_notebook_runs(
    chapter: Chapter, lang: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    with contextlib.suppress(ModuleNotFoundError):
        import nbformat

        nbformat.validate(nbformat.read(chapter.notebook(lang), as_version=4))
    names: dict[str, Any] = {"__name__": "notebook"}
    monkeypatch.chdir(tmp_path)
    for source in code_cells(chapter, lang):
        exec(compile(source, str(chapter.notebook(lang)), "exec"), names)
    pyplot.close("all")
