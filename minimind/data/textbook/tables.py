"""Tables of facts, and the sentences that each fact can be put into.

A subject is two files: `rivers.tsv`, one row an entity and one column an attribute, and
`rivers.toml`, whose relations say how one attribute is stated, asked for and answered.
A cell may give several values that are right, parted by `|`; sentences use the first.
"""

import itertools
import string
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from minimind.errors import DataError

PACKAGED = Path(__file__).parent / "subjects"
LANGUAGES = ("zh", "en")
_TEMPLATES = ("statements", "questions", "held_out", "answers")
_OPTIONAL = ("followups", "distractors")


@dataclass(frozen=True)
class Row:
    """One entity: for each column the values that are right, none where the cell is empty."""

    line: int
    cells: Mapping[str, tuple[str, ...]]

    @property
    def name(self) -> str:
        """The entity."""
        return self.cells["name"][0]

    @cached_property
    def first(self) -> dict[str, str]:
        """The value that sentences use, for each column that has one."""
        return {column: values[0] for column, values in self.cells.items() if values}


@dataclass(frozen=True, eq=False)
class Relation:
    """How the facts of one column are stated, asked for and answered, as templates."""

    column: str
    key: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    held_out: tuple[str, ...]
    answers: tuple[str, ...]
    followups: tuple[str, ...]
    distractors: tuple[str, ...]
    rows: tuple[Row, ...]
    """The rows it speaks of: those with all the cells that its templates use."""

    def asked(self, key: str) -> frozenset[str]:
        """The columns that the question leaves open: those of the key, the name only if alone."""
        columns = placeholders([key])
        return columns - {"name"} or columns


@dataclass(frozen=True, eq=False)
class Subject:
    """One table with its relations; `title` is the name to show, `path` its .tsv file."""

    title: str
    language: str
    path: Path
    fact_columns: tuple[str, ...]
    rows: tuple[Row, ...]
    relations: tuple[Relation, ...]

    @property
    def num_facts(self) -> int:
        """Cells that hold a fact."""
        return sum(bool(row.cells[column]) for row in self.rows for column in self.fact_columns)

    @cached_property
    def facts(self) -> tuple["Fact", ...]:
        """Each row with each relation that speaks of it, row by row."""
        return tuple(
            Fact(self, relation, row)
            for row in self.rows
            for relation in self.relations
            if row in relation.rows
        )

    @cached_property
    def _by_row(self) -> dict[int, list["Fact"]]:
        found: dict[int, list[Fact]] = {}
        for fact in self.facts:
            found.setdefault(fact.row.line, []).append(fact)
        return found

    def facts_of(self, row: Row) -> list["Fact"]:
        """The facts of one row."""
        return self._by_row.get(row.line, [])


@dataclass(frozen=True, eq=False)
class Fact:
    """One fact as one relation speaks of it, in sentences."""

    subject: Subject
    relation: Relation
    row: Row

    @property
    def name(self) -> str:
        """The entity that it is about."""
        return self.row.name

    @property
    def asks_by_name(self) -> bool:
        """Whether its questions name the entity, so that "it" can be said after them."""
        return all("{name}" in question for question in self.relation.questions)

    @cached_property
    def keys(self) -> tuple[tuple[str, ...], ...]:
        """What a right answer contains: of each inner tuple any one."""
        return tuple(
            _fill(key, self.relation.asked(key), self.row, self.row) for key in self.relation.key
        )

    @cached_property
    def statements(self) -> tuple[str, ...]:
        """Sentences of prose."""
        return self._render(self.relation.statements)

    @cached_property
    def questions(self) -> tuple[str, ...]:
        """Ways of asking that are trained on."""
        return self._render(self.relation.questions)

    @cached_property
    def held_out(self) -> tuple[str, ...]:
        """Ways of asking that are never trained on."""
        return self._render(self.relation.held_out)

    @cached_property
    def answers(self) -> tuple[str, ...]:
        """Full answers."""
        return self._render(self.relation.answers)

    @cached_property
    def followups(self) -> tuple[str, ...]:
        """Questions that say "it" where the name would stand."""
        return self._render(self.relation.followups)

    def rivals(self, key: int = 0) -> list[str]:
        """Wrong values for one of its keys: the relation's distractors, or what other rows have."""
        template, right = self.relation.key[key], self.keys[key]
        asked = self.relation.asked(template)
        found = self.relation.distractors or (
            value
            for other in self.relation.rows
            if other is not self.row
            for value in _fill(template, asked, other, self.row)
        )
        return [value for value in dict.fromkeys(found) if value not in right]

    def answer_from(self, other: Row, template: str) -> str:
        """An answer to this question with the values of another row: most likely a wrong one."""
        asked = self.relation.asked(self.relation.key[0])
        moved = asked if asked == {"name"} else placeholders([template]) - {"name"}
        values = {column: other.first[column] for column in moved if column in other.first}
        return template.format_map(self.row.first | values)

    def _render(self, templates: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(template.format_map(self.row.first) for template in templates)


@cache
def load_subjects(folder: Path = PACKAGED) -> tuple[Subject, ...]:
    """All subjects of a folder, by file name. Raises DataError with the file and line."""
    paths = sorted(folder.glob("*.toml"))
    if not paths:
        raise DataError(f"{folder}: no subjects (pairs of a .toml and a .tsv file) are there.")
    return tuple(_load_subject(path) for path in paths)


def placeholders(templates: Iterable[str]) -> frozenset[str]:
    """The columns that templates name."""
    return frozenset(
        field for one in templates for _, field, _, _ in string.Formatter().parse(one) if field
    )


def _fill(key: str, asked: frozenset[str], source: Row, row: Row) -> tuple[str, ...]:
    """The key for `row` with the asked columns from `source`, once for each right value there."""
    cells = [source.cells[column] for column in sorted(asked)]
    return tuple(
        key.format_map(row.first | dict(zip(sorted(asked), values, strict=True)))
        for values in itertools.product(*cells)
    )


def _load_subject(path: Path) -> Subject:
    text = _read(path)
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"{path}: not valid TOML: {error}.") from None
    columns, rows = _load_rows(path.with_suffix(".tsv"))
    title, language = table.pop("title", None), table.pop("language", None)
    relations = table.pop("relations", [])
    fact_columns = tuple(table.pop("fact_columns", columns[1:]))
    if not isinstance(title, str) or language not in LANGUAGES or not relations:
        raise DataError(f"{path}: needs a title, a language (zh or en) and [[relations]].")
    for column in fact_columns:
        if column not in columns:
            raise DataError(f"{path}: fact_columns: the table has no column {column}.")
    if table:
        raise DataError(f"{path}: {', '.join(table)}: no such setting.")
    return Subject(
        title=title,
        language=language,
        path=path.with_suffix(".tsv"),
        fact_columns=fact_columns,
        rows=rows,
        relations=tuple(_load_relation(path, text, one, columns, rows) for one in relations),
    )


def _load_relation(
    path: Path, text: str, table: dict[str, Any], columns: list[str], rows: tuple[Row, ...]
) -> Relation:
    column = table.pop("column", None)
    where = f"{path}: relation on {column}"
    if column not in columns[1:]:
        raise DataError(f"{where}: `column` must be one of {', '.join(columns[1:])}.")
    fields = {"key": table.pop("key", [f"{{{column}}}"])}
    fields |= {name: table.pop(name, None) for name in _TEMPLATES}
    fields |= {name: table.pop(name, []) for name in _OPTIONAL}
    if table:
        raise DataError(f"{where}: {', '.join(table)}: no such setting.")
    for name, templates in fields.items():
        if not isinstance(templates, list) or not all(isinstance(t, str) for t in templates):
            raise DataError(f"{where}: `{name}` must be a list of strings.")
        for template in templates:
            _check_template(path, text, template, columns)
    used = {column} | placeholders(one for name in fields for one in fields[name])
    return Relation(
        column=column,
        rows=tuple(row for row in rows if used <= row.first.keys()),
        **{name: tuple(templates) for name, templates in fields.items()},
    )


def _check_template(path: Path, text: str, template: str, columns: list[str]) -> None:
    try:
        unknown = placeholders([template]) - set(columns)
    except ValueError as error:
        unknown = frozenset({f"({error})"})
    if unknown:
        line = text.count("\n", 0, max(text.find(template), 0)) + 1
        raise DataError(
            f"{path}:{line}: “{template}” names {', '.join(sorted(unknown))}, "
            f"but the columns are {', '.join(columns)}."
        )


def _load_rows(path: Path) -> tuple[list[str], tuple[Row, ...]]:
    lines = _read(path).splitlines()
    columns = lines[0].split("\t") if lines else []
    if columns[:1] != ["name"] or len(columns) < 2 or len(set(columns)) < len(columns):
        raise DataError(f"{path}:1: the header must be `name` and other columns, parted by tabs.")
    rows = []
    for line, content in enumerate(lines[1:], start=2):
        cells = content.split("\t")
        if len(cells) != len(columns) or not cells[0]:
            raise DataError(
                f"{path}:{line}: {len(cells)} cells, first “{cells[0]}”; "
                f"needs a name and as many cells as the header, {len(columns)}."
            )
        if cells != [cell.strip() for cell in cells]:
            raise DataError(f"{path}:{line}: a cell begins or ends with a space.")
        values = [tuple(cell.split("|")) if cell else () for cell in cells]
        if any("" in several for several in values):
            raise DataError(f"{path}:{line}: a cell gives an empty value beside a “|”.")
        rows.append(Row(line, dict(zip(columns, values, strict=True))))
    return columns, tuple(rows)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}.") from None
