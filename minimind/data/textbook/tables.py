"""Tables of facts, and the sentences that are rendered from each fact.

A subject is two files. `rivers.tsv` has one row per entity and one column per attribute.
`rivers.toml` has relations: templates of statements, questions and answers about one attribute.
A cell may contain several right values, separated by `|`; sentences use the first.
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
    """One entity. cells: the right values of each column, () for an empty cell."""

    line: int
    cells: Mapping[str, tuple[str, ...]]

    @property
    def name(self) -> str:
        """Name of the entity."""
        return self.cells["name"][0]

    @cached_property
    def first(self) -> dict[str, str]:
        """The value that sentences use, for each column that is not empty."""
        return {column: values[0] for column, values in self.cells.items() if values}


@dataclass(frozen=True, eq=False)
class Relation:
    """Templates of the statements, questions and answers about one column.

    rows: those that have all the cells that the templates use.
    """

    column: str
    key: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    held_out: tuple[str, ...]
    answers: tuple[str, ...]
    followups: tuple[str, ...]
    distractors: tuple[str, ...]
    rows: tuple[Row, ...]

    def asked_columns(self, key: str) -> frozenset[str]:
        """Return the columns that a question asks for: those of the key except `name`, if any."""
        columns = placeholders([key])
        return columns - {"name"} or columns

    @cached_property
    def asks_by_name(self) -> bool:
        """True if all questions contain the name of the entity."""
        return all("{name}" in question for question in self.questions)

    @cached_property
    def key_values(self) -> list[list[str]]:
        """The right values of all rows, for each key."""
        return [
            [
                value
                for row in self.rows
                for value in _render_key(key, self.asked_columns(key), row, row)
            ]
            for key in self.key
        ]


@dataclass(frozen=True, eq=False)
class Subject:
    """A table with its relations. title: display name. path: the .tsv file."""

    title: str
    language: str
    path: Path
    fact_columns: tuple[str, ...]
    rows: tuple[Row, ...]
    relations: tuple[Relation, ...]

    @property
    def num_facts(self) -> int:
        """Number of cells with a fact."""
        return sum(bool(row.cells[column]) for row in self.rows for column in self.fact_columns)

    @cached_property
    def facts(self) -> tuple["Fact", ...]:
        """All pairs of a row and a relation that applies to it, row by row."""
        lines = [{row.line for row in relation.rows} for relation in self.relations]
        return tuple(
            Fact(self, relation, row)
            for row in self.rows
            for relation, applies_to in zip(self.relations, lines, strict=True)
            if row.line in applies_to
        )

    @cached_property
    def _by_row(self) -> dict[int, list["Fact"]]:
        by_line: dict[int, list[Fact]] = {}
        for fact in self.facts:
            by_line.setdefault(fact.row.line, []).append(fact)
        return by_line

    def facts_of(self, row: Row) -> list["Fact"]:
        """Return the facts of one row."""
        return self._by_row.get(row.line, [])


@dataclass(frozen=True, eq=False)
class Fact:
    """One fact: a relation applied to a row, rendered as sentences."""

    subject: Subject
    relation: Relation
    row: Row

    @property
    def name(self) -> str:
        """Name of the entity."""
        return self.row.name

    @property
    def asks_by_name(self) -> bool:
        """True if all questions contain the name, so that a follow-up can refer to the entity."""
        return self.relation.asks_by_name

    @cached_property
    def keys(self) -> tuple[tuple[str, ...], ...]:
        """Keys of a right answer, which contains at least one of each inner tuple."""
        return tuple(
            _render_key(key, self.relation.asked_columns(key), self.row, self.row)
            for key in self.relation.key
        )

    @cached_property
    def statements(self) -> tuple[str, ...]:
        """Statements for prose."""
        return self._render(self.relation.statements)

    @cached_property
    def questions(self) -> tuple[str, ...]:
        """Questions of the training data."""
        return self._render(self.relation.questions)

    @cached_property
    def held_out(self) -> tuple[str, ...]:
        """Questions of the quiz, which are not in the training data."""
        return self._render(self.relation.held_out)

    @cached_property
    def answers(self) -> tuple[str, ...]:
        """Answers in full sentences."""
        return self._render(self.relation.answers)

    @cached_property
    def followups(self) -> tuple[str, ...]:
        """Questions that refer to the entity by a pronoun."""
        return self._render(self.relation.followups)

    def distractors(self, key: int = 0) -> list[str]:
        """Return wrong values for a key: the relation's distractors, or values of other rows."""
        template, right = self.relation.key[key], self.keys[key]
        asked = self.relation.asked_columns(template)
        if self.relation.distractors:
            values: Iterable[str] = self.relation.distractors
        elif placeholders([template]) == asked:  # the usual case: all facts share the values
            values = self.relation.key_values[key]
        else:
            values = (
                value
                for other in self.relation.rows
                if other is not self.row
                for value in _render_key(template, asked, other, self.row)
            )
        return [value for value in dict.fromkeys(values) if value not in right]

    def answer_from(self, other: Row, template: str) -> str:
        """Render an answer with the values of another row, which is most likely wrong."""
        asked = self.relation.asked_columns(self.relation.key[0])
        replaced = asked if asked == {"name"} else placeholders([template]) - {"name"}
        values = {column: other.first[column] for column in replaced if column in other.first}
        return template.format_map(self.row.first | values)

    def _render(self, templates: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(template.format_map(self.row.first) for template in templates)


@cache
def load_subjects(folder: Path = PACKAGED) -> tuple[Subject, ...]:
    """Load all subjects of a folder, by file name. Raises DataError with the file and line."""
    paths = sorted(folder.glob("*.toml"))
    if not paths:
        raise DataError(f"{folder}: no subjects (pairs of a .toml and a .tsv file).")
    return tuple(_load_subject(path) for path in paths)


def placeholders(templates: Iterable[str]) -> frozenset[str]:
    """Return the columns that occur in templates."""
    return frozenset(
        field
        for template in templates
        for _, field, _, _ in string.Formatter().parse(template)
        if field
    )


def _render_key(key: str, asked: frozenset[str], source: Row, row: Row) -> tuple[str, ...]:
    """Render a key of `row` with each right value of the asked columns of `source`."""
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
        raise DataError(f"{path}: {', '.join(table)}: unknown setting.")
    return Subject(
        title=title,
        language=language,
        path=path.with_suffix(".tsv"),
        fact_columns=fact_columns,
        rows=rows,
        relations=tuple(_load_relation(path, text, table, columns, rows) for table in relations),
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
        raise DataError(f"{where}: {', '.join(table)}: unknown setting.")
    for name, templates in fields.items():
        if not isinstance(templates, list) or not all(isinstance(t, str) for t in templates):
            raise DataError(f"{where}: `{name}` must be a list of strings.")
        for template in templates:
            _check_template(path, text, template, columns)
    used = {column} | placeholders(template for name in fields for template in fields[name])
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
            f"{path}:{line}: “{template}” uses {', '.join(sorted(unknown))}, "
            f"but the columns are {', '.join(columns)}."
        )


def _load_rows(path: Path) -> tuple[list[str], tuple[Row, ...]]:
    lines = _read(path).splitlines()
    columns = lines[0].split("\t") if lines else []
    if columns[:1] != ["name"] or len(columns) < 2 or len(set(columns)) < len(columns):
        raise DataError(
            f"{path}:1: the header must be `name` and other columns, separated by tabs."
        )
    rows = []
    for line, content in enumerate(lines[1:], start=2):
        cells = content.split("\t")
        if len(cells) != len(columns) or not cells[0]:
            raise DataError(
                f"{path}:{line}: {len(cells)} cells, first “{cells[0]}”; "
                f"a row needs a name and the number of cells of the header, {len(columns)}."
            )
        if cells != [cell.strip() for cell in cells]:
            raise DataError(f"{path}:{line}: a cell begins or ends with a space.")
        values = [tuple(cell.split("|")) if cell else () for cell in cells]
        if any("" in alternatives for alternatives in values):
            raise DataError(f"{path}:{line}: a cell has an empty value before or after “|”.")
        rows.append(Row(line, dict(zip(columns, values, strict=True))))
    return columns, tuple(rows)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}.") from None
