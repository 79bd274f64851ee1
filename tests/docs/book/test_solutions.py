"""Solutions of the exercises run, each after the cells of its chapter that it needs."""

import symtable
from typing import Any

import pytest

from docs.book.chapters import Chapter, cells, chapters, read_region, solutions

CHAPTERS = [pytest.param(chapter, id=chapter.stem) for chapter in chapters()]


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_solutions_of_a_chapter_are_right(chapter: Chapter) -> None:
    file = chapter.folder / "solutions.py"
    for regions in solutions(chapter):
        code = "\n\n".join(read_region(file, region) for region in regions)
        assert "assert " in code, f"the solution {regions} checks nothing"
        names: dict[str, Any] = {"__name__": "solution"}
        for source in [*cells_for(chapter, code), code]:
            exec(compile(source, str(file), "exec"), names)


def cells_for(chapter: Chapter, code: str) -> list[str]:
    """Return the cells that define, directly or indirectly, the names that `code` uses."""
    needed, kept = used_names(code) - defined_names(code), []
    for name, source, _ in reversed(cells(chapter.folder / "chapter.py")):
        if name and defined_names(source) & needed:
            needed |= used_names(source)
            kept.append(source)
    return kept[::-1]


def defined_names(source: str) -> set[str]:
    """Return the names that a module assigns, imports or defines."""
    symbols = symtable.symtable(source, "cell", "exec").get_symbols()
    return {s.get_name() for s in symbols if s.is_assigned() or s.is_imported()}


def used_names(source: str) -> set[str]:
    """Return the names that a module, its functions and its classes refer to."""
    top = symtable.symtable(source, "cell", "exec")
    used = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_referenced()}
    scopes = top.get_children()
    while scopes:
        scope = scopes.pop()
        scopes += scope.get_children()
        used |= {symbol.get_name() for symbol in scope.get_symbols() if symbol.is_global()}
    return used


def test_only_cells_that_a_solution_needs_are_run() -> None:
    assert used_names("def f(a):\n    return a + b\nc = [d for e in g]") == {"b", "d", "g"}
    assert defined_names("import a.b as c\ndef f(): x = 1\nd = 2\nfor e in d: pass") == {
        *("c", "f", "d", "e")
    }
