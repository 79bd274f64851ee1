"""Run a chapter's script in this process and write its outputs.

    python -m docs.book.execute 01-language-model FOLDER

FOLDER receives the outputs, and `inputs.json` with the files of the repository that the script read
or imported. `docs/book/outputs.py` starts this in a separate process, so that the list is exact.
"""

import contextlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from docs.book.chapters import LANGUAGES, ROOT, Chapter, cells

_COLOR_STYLE = (
    "<style>:root{color:#333}"
    "@media(prefers-color-scheme:dark){:root{color:#ddd}}</style>"
)
_opened: set[str] = set()


def main(stem: str, out: Path) -> None:
    """Execute the script of chapter `stem` and write its outputs into `out`."""
    sys.addaudithook(_note_opened)
    namespace, printed = run_cells(Chapter(stem).folder / "chapter.py")
    for name, text in printed.items():
        _write(out / f"{name}.txt", text)
    if facts := namespace.get("facts"):
        _write_json(
            out / "facts.json",
            {
                key: list(value) if isinstance(value, tuple) else str(value)
                for key, value in facts.items()
            },
        )
    if (piece := namespace.get("piece")) is not None:
        _write_json(out / "piece.json", piece)
    for lang in LANGUAGES:
        for name, value in namespace.items():
            kind, _, label = name.partition("_")
            if kind == "figure" and callable(value):
                _write(
                    out / f"{label.replace('_', '-')}.{lang}.svg",
                    draw(value, lang, stem),
                )
            if kind == "table" and callable(value):
                _write(
                    out / f"{label.replace('_', '-')}.{lang}.md",
                    _table(value(chooser(lang))),
                )
    _write_json(out / "inputs.json", sorted(_inputs()))


def run_cells(
    script: Path, *, skip: Callable[[str], bool] = lambda source: False
) -> tuple[dict[str, Any], dict[str, str]]:
    """Execute a script; return its namespace and what each cell printed.

    skip: cells not to execute, by their source.
    """
    namespace: dict[str, Any] = {"__name__": "chapter", "__file__": str(script)}
    printed = {}
    for name, source, line in cells(script):
        if skip(source):
            continue
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(compile("\n" * (line - 1) + source, script, "exec"), namespace)
        if name and output.getvalue():
            printed[name] = output.getvalue()
    return namespace, printed


def chooser(lang: str) -> Callable[[str, str], str]:
    """Return `say(english, chinese)` for one language."""
    return lambda english, chinese: english if lang == "en" else chinese


def draw(function: Callable[..., Any], lang: str, salt: str) -> str:
    """Return the SVG file of a figure, whose colours follow light and dark mode."""
    import matplotlib

    from minimind.reporting.plots import new_figure, to_svg

    # Text stays text, in the reader's fonts: few systems that build have Chinese ones.
    style = {"svg.fonttype": "none", "font.family": "sans-serif"}
    with (
        new_figure((6.4, 3.2), salt=f"{salt} {function.__name__}") as figure,
        matplotlib.rc_context(style),
    ):
        function(figure, chooser(lang))
        drawing = to_svg(figure)
    drawing = "\n".join(line.rstrip() for line in drawing.splitlines())
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return drawing.replace("<svg", f"<svg {names}", 1).replace(
        ">", f">{_COLOR_STYLE}", 1
    )


def _table(rows: list[list[object]]) -> str:
    head, *body = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    numeric = [
        all(row[i][:1] in "0123456789-–−" for row in body) for i in range(len(head))
    ]
    rule = ["---:" if is_number else "---" for is_number in numeric]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *body])


def _note_opened(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str):
        _opened.add(arguments[0])


def _inputs() -> set[str]:
    """Return the files of the repository that were read or imported, as POSIX paths."""
    modules = {
        getattr(module, "__file__", None) or ""
        for module in list(sys.modules.values())
    }
    files = {Path(name).resolve() for name in modules | _opened if name}
    names = {
        file.relative_to(ROOT).as_posix() for file in files if ROOT in file.parents
    }
    return {
        name
        for name in names
        if (ROOT / name).is_file()
        and not any(
            part.startswith(".") or part == "__pycache__"
            for part in Path(name).parts
        )
    }


def _write(path: Path, text: str) -> None:
    path.write_text(text.rstrip() + "\n", encoding="utf-8", newline="\n")


def _write_json(path: Path, value: object) -> None:
    _write(path, json.dumps(value, ensure_ascii=False, indent=1))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
