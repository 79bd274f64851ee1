"""Check of the links to package code: the one before a region names the code that is shown."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from docs.book.chapters import INCLUDE

_LINK = re.compile(r"\[`([^`]+)`\]\(([^)\s]+)\)")
_Scope = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def link_problems(text: str, root: Path) -> Iterator[str]:
    """Yield one line per region of the package whose last link before it names other code.

    A region can move to another function while its name and the page stay the same.
    """
    for include in INCLUDE.finditer(text):
        file, region = include.groups()
        if (
            not file.startswith("minimind/")
            or not region
            or not (root / file).is_file()
        ):
            continue
        links = _LINK.findall(text[: include.start()])
        linked = [name for name, target in links if target.endswith(file)]
        names = _names(root / file, region)
        if names and not names.intersection(linked[-1:]):
            yield (
                f"{file}:{region} is linked as {linked[-1] if linked else 'nothing'}, "
                f"and shows code of {', '.join(sorted(names))}"
            )


def _names(file: Path, region: str) -> set[str]:
    """Return the names that a link to a region may have; empty if there is no such region."""
    source = file.read_text("utf-8")
    marks = [source.find(f"[{mark}:{region}]") for mark in ("start", "end")]
    if min(marks) < 0:
        return set()  # reported by `docs.build`
    start, end = (source.count("\n", 0, mark) + 1 for mark in marks)
    names = {file.name}

    def visit(node: ast.AST, scopes: tuple[str, ...]) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, _Scope):
                inner = (*scopes, child.name)
                if child.lineno <= end and (child.end_lineno or end) >= start:
                    names.update({child.name, ".".join(inner)})
                visit(child, inner)
            elif (
                isinstance(child, ast.Assign)
                and not scopes
                and start <= child.lineno <= end
            ):
                names.update(
                    target.id
                    for target in child.targets
                    if isinstance(target, ast.Name)
                )

    visit(ast.parse(source), ())
    return names
