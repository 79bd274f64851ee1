"""Outputs of the chapters' scripts: what makes them stale, and that they can be reproduced."""

import shutil
from pathlib import Path

import pytest

from docs.book import checks, outputs
from docs.book.chapters import ROOT, Chapter, chapters, read_region
from docs.book.execute import run_cells
from docs.book.links import link_problems

CHAPTERS = [pytest.param(chapter, id=chapter.stem) for chapter in chapters()]
SCRIPT = """\
# --8<-- [start:answer]
answer = 6 * 7
print(answer)
# --8<-- [end:answer]
facts = {"answer": answer}


def figure_line(figure, say):
    figure.subplots().set_xlabel(say("time", "时间"))


def table_powers(say):
    return [[say("number", "数"), say("square|", "平方")], [2, 4], [3, 9]]


piece = {"a": [1]}
"""
SOLUTIONS = """\
# --8<-- [start:one]
assert answer == 42
# --8<-- [end:one]
"""
PAGE = """\
# 1 Title

The answer is 42<!--=answer-->.

```python
--8<-- "docs/book/01-tiny/chapter.py:answer"
```

```text
--8<-- "docs/book/01-tiny/outputs/answer.txt"
```

![A picture with nothing but an axis.](../../book/01-tiny/outputs/line.en.svg)

--8<-- "docs/book/01-tiny/outputs/powers.en.md"

<div class="piece" id="toy">
A toy.
</div>

<details markdown="1">
<summary>Solution</summary>

```python
--8<-- "docs/book/01-tiny/solutions.py:one"
```

</details>
"""


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with one chapter whose outputs are fresh; read-only."""
    root = tmp_path_factory.mktemp("book")
    (root / "docs" / "book" / "01-tiny").mkdir(parents=True)
    for path in [ROOT / "docs/__init__.py", *(ROOT / "docs/book").glob("*.py")]:
        shutil.copyfile(path, root / path.relative_to(ROOT))
    (root / "minimind").symlink_to(ROOT / "minimind")
    chapter = Chapter("01-tiny", root)
    (chapter.folder / "chapter.py").write_text(SCRIPT, encoding="utf-8")
    (chapter.folder / "solutions.py").write_text(SOLUTIONS, encoding="utf-8")
    (chapter.folder / "piece.js").write_text("function bookPiece() {}\n", encoding="utf-8")
    for lang in ("en", "zh"):
        chapter.page(lang).parent.mkdir(parents=True)
        chapter.page(lang).write_text(PAGE.replace(".en.", f".{lang}."), encoding="utf-8")
    outputs.refresh(chapter)
    return root


@pytest.fixture
def tiny(book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chapter:
    """A copy of the chapter in a separate folder, which a test may change."""
    monkeypatch.setattr(checks, "_MIN_EXERCISES", 1)
    shutil.copytree(book, tmp_path / "book", symlinks=True)
    chapter = Chapter("01-tiny", tmp_path / "book")
    checks.notebook.write(chapter)
    return chapter


def problems(chapter: Chapter) -> str:
    outputs.hash_of.cache_clear()
    return "\n".join(checks.problems_of(chapter))


def test_a_script_writes_texts_values_tables_figures_and_data(tiny: Chapter) -> None:
    written = {path.name for path in tiny.outputs.iterdir()} - {"manifest.json"}
    assert written == {"answer.txt", "facts.json", "piece.json", "line.en.svg", "line.zh.svg",
                       "powers.en.md", "powers.zh.md"}  # fmt: skip
    assert (tiny.outputs / "answer.txt").read_text() == "42\n"
    table = "| number | square\\| |\n| ---: | ---: |\n| 2 | 4 |\n| 3 | 9 |\n"
    assert (tiny.outputs / "powers.en.md").read_text() == table
    drawing = (tiny.outputs / "line.zh.svg").read_text("utf-8")
    assert "时间" in drawing and "currentColor" in drawing and "prefers-color-scheme" in drawing


def test_a_fresh_chapter_has_no_problem(tiny: Chapter) -> None:
    assert problems(tiny) == ""


def test_the_link_before_a_region_names_its_code() -> None:
    page = '([`{}`](../minimind/model/norm.py)):\n\n--8<-- "minimind/model/norm.py:rms-norm"\n'
    assert list(link_problems(page.format("rms_norm_cpu"), ROOT)) == []
    assert list(link_problems(page.format("norm.py"), ROOT)) == []
    [problem] = link_problems(page.format("RMSNorm"), ROOT)
    assert "rms-norm is linked as RMSNorm, and shows code of norm.py, rms_norm_cpu" in problem
    [problem] = link_problems(page.partition(":\n")[2], ROOT)
    assert "is linked as nothing" in problem


@pytest.mark.parametrize(
    ("name", "old", "new", "problem"),
    [
        ("chapter.py", "6 * 7", "6 * 8", "stale because of docs/book/01-tiny/chapter.py"),
        ("outputs/answer.txt", "42", "43", "stale because of docs/book/01-tiny/outputs/answer.txt"),
        ("solutions.py", "one]", "two]", "solutions.py has ['two']"),
        ("../execute.py", "import io\n", "import io\nimport os\n", "docs/book/execute.py"),
        ("../../en/book/01-tiny.md", "# 1 ", "# 2 ", "the title must begin with '# 1 '"),
        ("../../en/book/01-tiny.md", "42<", "41<", "states 41 for answer, which is 42"),
        ("../../en/book/01-tiny.md", "42<!--=answer-->", "42", "does not state answer"),
        ("../../en/book/01-tiny.md", "chapter.py:answer", "chapter.py:no", "the cells ['no']"),
        ("../../en/book/01-tiny.md", "powers.en.md", "gone.en.md", "uses the output gone.en.md"),
        ("../../en/book/01-tiny.md", "answer.txt", "gone.txt", "does not use the output answer"),
        ("../../en/book/01-tiny.md", "A picture with nothing but an axis.", "", "describe the"),
        ("../../en/book/01-tiny.md", '"toy"', "toy", "has 0 interactive pieces"),
        ("../../en/book/01-tiny.md", '<details markdown="1">', "<details>", "has 0 exercises"),
        ("../../en/book/01-tiny.md", "The answer", "An answer", "01-tiny.ipynb: stale"),
    ],
)
def test_a_fault_is_named(tiny: Chapter, name: str, old: str, new: str, problem: str) -> None:
    path = (tiny.folder / name).resolve()
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    assert problem in problems(tiny)


def test_a_leftover_output_is_stale(tiny: Chapter) -> None:
    (tiny.outputs / "old.txt").write_text("old")
    assert "stale because of docs/book/01-tiny/outputs/old.txt" in problems(tiny)


def test_comments_and_docstrings_of_a_module_do_not_count(tmp_path: Path) -> None:
    hashes = []
    for source in (
        'def f():\n    """Old."""\n    return "# 1"\n',
        '# new\ndef f():\n    """New.\n\n    Long.\n    """\n\n    return "# 1"  # one\n',
        'def f():\n    """Old."""\n    return "# 2"\n',
    ):
        (tmp_path / "module.py").write_text(source, encoding="utf-8")
        outputs.hash_of.cache_clear()
        hashes.append(outputs.hash_of(tmp_path / "module.py"))
    assert hashes[0] == hashes[1] != hashes[2]
    assert outputs.hash_of(tmp_path / "none.py") is None


def test_a_failing_script_is_shown_with_its_line(tmp_path: Path) -> None:
    script = tmp_path / "chapter.py"
    script.write_text("# --8<-- [start:a]\nx = 1\n# --8<-- [end:a]\n\n1 / 0\n")
    with pytest.raises(ZeroDivisionError) as failure:
        run_cells(script)
    assert failure.traceback[-1].lineno == 4  # counted from 0


def test_a_region_is_read_without_indentation_and_markers(tmp_path: Path) -> None:
    file = tmp_path / "code.py"
    file.write_text(
        "def f():\n    # --8<-- [start:a]\n    x = 1\n    # --8<-- [start:b]\n    y = 2\n"
        "    # --8<-- [end:b]\n    # --8<-- [end:a]\n"
    )
    assert read_region(file, "a") == "x = 1\ny = 2"
    assert read_region(file, "b") == "y = 2"


@pytest.mark.slow
@pytest.mark.parametrize("chapter", CHAPTERS)
def test_texts_and_tables_are_reproduced(chapter: Chapter, tmp_path: Path) -> None:
    outputs.run_script(chapter, tmp_path)
    for path in chapter.outputs.iterdir():
        if path.suffix in (".txt", ".md") or path.name == "facts.json":
            assert (tmp_path / path.name).read_text("utf-8") == path.read_text("utf-8"), path
