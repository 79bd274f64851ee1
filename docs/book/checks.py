"""Checks of the book: every line of code, output, figure and value in it is what the code gives."""

import json
import re
from collections.abc import Iterator

from docs.book import notebook, outputs
from docs.book.chapters import (
    EXERCISE,
    FACT,
    FORMULA,
    IMAGE,
    INCLUDE,
    LANGUAGES,
    PIECE,
    Chapter,
    cell_names,
    chapters,
    read_region,
    solutions,
)
from docs.book.links import link_problems

_MIN_EXERCISES = 3
_MIN_ALT = 20  # columns
_MAX_WIDTH = 84  # columns of code that fit beside the navigation
_LANGUAGE = re.compile(r"\.(?:en|zh)(?=\.(?:md|svg)$)")
_TEXT = re.compile(r"\\text\{[^}]*\}")


def find_problems() -> list[str]:
    """Return one line per stale output, unused part or other fault of the chapters."""
    return [problem for chapter in chapters() for problem in problems_of(chapter)]


def outline(text: str) -> dict[str, list[str]]:
    """Return what both languages of a chapter must share, beside `docs.build.outline`."""
    return {
        "formulas": sorted(_TEXT.sub("", a or b) for a, b in FORMULA.findall(text)),
        "values": sorted(key for _, key in FACT.findall(text)),
        "exercises": [str(len(EXERCISE.findall(text)))],
        "interactive pieces": [name for name, _ in PIECE.findall(text)],
    }


def without_language(name: str) -> str:
    """Return the name of a file that exists once per language, without the language."""
    return _LANGUAGE.sub("", name)


def problems_of(chapter: Chapter) -> Iterator[str]:
    """Yield one line per fault of a chapter."""
    missing = [
        name
        for name in ("chapter.py", "solutions.py", "piece.js")
        if not (chapter.folder / name).is_file()
    ]
    if missing:
        yield from (
            f"{chapter.path_in_repository(name)}: missing" for name in missing
        )
        return
    if stale := outputs.stale(chapter):
        yield f"book {chapter.stem}: stale because of {', '.join(stale)}; run: make book"
        return
    yield from (
        f"book {chapter.stem}: {problem}" for problem in _width_problems(chapter)
    )
    for lang in LANGUAGES:
        if not chapter.page(lang).is_file():
            continue  # reported by docs.build
        page = f"docs/{lang}/book/{chapter.stem}.md"
        yield from (
            f"{page}: {problem}" for problem in _page_problems(chapter, lang)
        )
        path = chapter.notebook(lang)
        if not path.is_file() or path.read_text("utf-8") != notebook.render(
            chapter, lang
        ):
            yield f"{path.relative_to(chapter.root).as_posix()}: stale; run: make book"


def _page_problems(chapter: Chapter, lang: str) -> Iterator[str]:
    text = chapter.text(lang)
    if not text.startswith(f"# {chapter.number} "):
        yield f"the title must begin with '# {chapter.number} '"
    yield from _include_problems(chapter, lang, text)
    yield from _fact_problems(chapter, lang, text)
    yield from link_problems(text, chapter.root)
    for alt, target in IMAGE.findall(text):
        if _width(alt) < _MIN_ALT:
            yield f"{target}: describe the picture in the brackets, for those who cannot see it"
    if len(pieces := PIECE.findall(text)) != 1:
        yield f'has {len(pieces)} interactive pieces (<div class="piece" id="…">), not 1'
    found = solutions(chapter, lang)
    if len(found) < _MIN_EXERCISES:
        yield f"has {len(found)} exercises, fewer than {_MIN_EXERCISES}"
    if not all(found):
        yield "an exercise has no solution from solutions.py"
    shown = [region for regions in found for region in regions]
    if shown != (written := cell_names(chapter.folder / "solutions.py")):
        yield f"shows the solutions {shown}; solutions.py has {written}"


def _include_problems(chapter: Chapter, lang: str, text: str) -> Iterator[str]:
    """Yield cells, tables, figures and outputs that are missing, unused or out of order."""
    includes = INCLUDE.findall(text)
    script = chapter.path_in_repository("chapter.py")
    shown = [region for file, region in includes if file == script]
    if shown != (written := cell_names(chapter.folder / "chapter.py")):
        yield f"shows the cells {shown}; chapter.py has {written}"
    folder = chapter.path_in_repository("outputs/")
    used = {
        file.removeprefix(folder) for file, _ in includes if file.startswith(folder)
    }
    for _, target in IMAGE.findall(text):
        path = (chapter.page(lang).parent / target).resolve()
        if chapter.outputs in path.parents:
            used.add(path.name)
    internal = {"manifest.json", "facts.json", "piece.json"}
    other = {f".{other}." for other in LANGUAGES if other != lang}
    made = {path.name for path in chapter.outputs.iterdir()} - internal
    for name in sorted(used - made):
        yield f"uses the output {name}, which chapter.py does not write"
    for name in sorted(
        name for name in made - used if not any(o in name for o in other)
    ):
        yield f"does not use the output {name}"


def _width_problems(chapter: Chapter) -> Iterator[str]:
    """Yield cells and texts whose lines do not fit beside the navigation."""
    script = chapter.folder / "chapter.py"
    texts = {
        f"the cell {name}": read_region(script, name) for name in cell_names(script)
    }
    texts |= {
        path.name: path.read_text("utf-8") for path in chapter.outputs.glob("*.txt")
    }
    for name, text in texts.items():
        if wide := [
            line for line in text.splitlines() if _width(line) > _MAX_WIDTH
        ]:
            yield f"{name} is wider than {_MAX_WIDTH} columns: {wide[0]}"


def _fact_problems(chapter: Chapter, lang: str, text: str) -> Iterator[str]:
    path = chapter.outputs / "facts.json"
    written = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    facts = {
        key: value[LANGUAGES.index(lang)] if isinstance(value, list) else value
        for key, value in written.items()
    }
    stated = [(" ".join(value.split()), key) for value, key in FACT.findall(text)]
    for value, key in stated:
        if facts.get(key) != value:
            yield f"states {value} for {key}, which is {facts.get(key, 'not in facts')}"
    for key in sorted(facts.keys() - {key for _, key in stated}):
        yield f"does not state {key} of facts"


def _width(text: str) -> int:
    """Return the columns of a text in a fixed-width font; a Chinese character takes two."""
    return sum(1 + (ord(character) > 0x2E80) for character in text)
