"""Multiple-choice benchmarks, read from the layouts in which they are published.

    <name>.jsonl (.zst, .gz, …)       one question per line: {"id", "subject", "split", "question",
                                      "A", "B", …, "answer"}, optionally with "passage"
    {dev,val,test}/<subject>_val.csv  C-Eval and MMLU
    {dev,test}/<subject>.csv          CMMLU
    a .zip or .tar.* of these         as downloaded
    FILE.csv                          any questions, with the columns question, A, B, …, answer

MMLU's files have no header. The questions of the split "dev" are few-shot examples for the others.
"""

import csv
import hashlib
import io
import re
import shutil
import string
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from minimind.data.input_files import walk_files
from minimind.data.invalid import InvalidRecords
from minimind.data.read import read_objects
from minimind.data.registry import download_hint
from minimind.errors import DataError
from minimind.paths import expand_user

LETTERS = string.ascii_uppercase[:8]
_TABLES = re.compile(r"(?:.*/)?(dev|val|test)/([\w-]+?)(?:_(?:dev|val|test))?\.csv", re.IGNORECASE)
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
_MMLU_COLUMNS = ["question", "a", "b", "c", "d", "answer"]
_MAX_FIELD_CHARACTERS = 1 << 20
_MAX_TABLES = 10_000  # of an archive


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: its evaluated split, its language, and the names of its folders."""

    name: str
    split: str
    language: str
    folders: tuple[str, ...] = ()


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("ceval", "val", "zh", ("ceval", "ceval-exam")),
        Benchmark("cmmlu", "test", "zh", ("cmmlu",)),
        Benchmark("mmlu", "test", "en", ("mmlu",)),
        Benchmark("c3", "test", "zh"),
    )
}


@dataclass(frozen=True)
class Question:
    """A multiple-choice question. answer: the index of the correct option."""

    id: str
    subject: str
    question: str
    options: tuple[str, ...]
    answer: int
    passage: str = ""

    @property
    def letter(self) -> str:
        """The letter of the correct option."""
        return LETTERS[self.answer]

    def as_text(self) -> str:
        """Return the question and its options, one per line."""
        return "\n".join((self.question, *self.options))


@dataclass
class Questions:
    """The questions of a benchmark, few-shot examples by subject, and the invalid rows."""

    benchmark: Benchmark
    questions: list[Question] = field(default_factory=list)
    examples: dict[str, list[Question]] = field(default_factory=dict)
    invalid: InvalidRecords = field(default_factory=InvalidRecords)

    def sha256(self) -> str:
        """Return the hash of all questions and examples."""
        digest = hashlib.sha256()
        for question in self.questions:
            digest.update(repr(question).encode())
        for examples in self.examples.values():
            for question in examples:
                digest.update(repr(question).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class SubjectInfo:
    """The name of a subject in prompts, and its group of subjects."""

    name: str
    group: str


@cache
def subjects(benchmark: str) -> dict[str, SubjectInfo]:
    """Return a benchmark's subjects, by their names in its files.

    Names are those of lm-eval's descriptions; groups are those of the benchmark's authors.
    """
    path = Path(__file__).with_name("subjects.csv")
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["benchmark"] == benchmark]
    return {row["subject"]: SubjectInfo(row["name"], row["group"]) for row in rows}


def subject_info(benchmark: str, subject: str) -> SubjectInfo:
    """Return the information on a subject; an unknown one is in the group "other"."""
    return subjects(benchmark).get(subject) or SubjectInfo(subject.replace("_", " "), "other")


def read_benchmark(name: str, sources: Sequence[str]) -> Questions:
    """Read the benchmark `name` from the first source that has it.

    For a name that is not in BENCHMARKS, the source is the file of questions. Invalid rows are
    counted in `invalid`. Raises DataError if no source has the benchmark.
    """
    benchmark = BENCHMARKS.get(name)
    for source in sources:
        path = expand_user(source)
        if not path.exists():
            raise DataError(f"{source}: no such file or folder; give --data a folder that exists")
        with _find_files(benchmark, path) as files:
            if files:
                return _read_questions(benchmark or Benchmark(path.stem, "test", ""), files)
    names = f"{name}.jsonl"
    if benchmark and benchmark.folders:
        names += f" or {' or '.join(benchmark.folders)}"
    raise DataError(
        f"{', '.join(sources) or '--data'}: found no {name} ({names}); put it there, or give its "
        f"path with --task {name}:PATH{download_hint(name)}"
    )


@dataclass(frozen=True)
class _File:
    """A file of questions. split and subject: None if the rows contain them."""

    split: str | None
    subject: str | None
    path: Path


@contextmanager
def _find_files(benchmark: Benchmark | None, source: Path) -> Iterator[list[_File]]:
    """Find the files of a benchmark in a file, folder or archive."""
    if source.is_file() and not source.name.endswith(_ARCHIVES):
        yield [_File(None, None, source)]
        return
    if benchmark is None:
        raise DataError(f"{source}: give a file with the columns question, A, B, …, answer")
    if source.is_dir():
        records = sorted(
            path
            for path in source.glob(f"{benchmark.name}.*")
            if _data_suffix(path) in (".jsonl", ".json")
        )
        if records:
            yield [_File(None, None, records[0])]
            return
        if tables := _find_tables(benchmark, source):
            yield tables
            return
        names = (benchmark.name, *benchmark.folders)
        archives = [
            path
            for path in sorted(source.iterdir())
            if path.name.endswith(_ARCHIVES) and path.name.startswith(names)
        ]
    else:
        archives = [source]
    if not archives:
        yield []
        return
    with tempfile.TemporaryDirectory() as folder:
        _unpack(archives[0], Path(folder))
        yield _find_tables(benchmark, Path(folder))


def _data_suffix(path: Path) -> str:
    return next((s for s in path.suffixes if s in (".jsonl", ".json", ".csv")), "")


def _find_tables(benchmark: Benchmark, folder: Path) -> list[_File]:
    """Find a benchmark's CSV files in its own folder, in `data`, or anywhere below `folder`."""
    for root in [*(folder / name for name in (*benchmark.folders, "data")), folder]:
        files: list[_File] = []
        for path in sorted(walk_files(root)) if root.is_dir() else ():
            match = _TABLES.fullmatch(path.relative_to(folder).as_posix())
            if match and match[2] in subjects(benchmark.name):
                files.append(_File(match[1].lower(), match[2], path))
        if any(file.split == benchmark.split for file in files):
            return files
    return []


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack the CSV files of an archive. Raises DataError if the archive is damaged."""

    def destinations(names: Iterable[str]) -> list[tuple[str, Path]]:
        """Return (member, destination); the member's own path could lead out of the folder."""
        tables: dict[Path, str] = {}
        for name in names:
            if match := _TABLES.fullmatch(name):
                path = folder / "data" / match[1].lower() / name.rsplit("/", 1)[-1]
                if path in tables:
                    raise DataError(f"{archive}: {tables[path]} and {name} have the same name")
                tables[path] = name
        if len(tables) > _MAX_TABLES:
            raise DataError(
                f"{archive}: has {len(tables):,} CSV files, and a benchmark has at most "
                f"{_MAX_TABLES:,}; unpack those that you need into a folder"
            )
        return [(name, path) for path, name in tables.items()]

    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as packed:
                for name, path in destinations(dict.fromkeys(packed.namelist())):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(packed.read(name))
            return
        with tarfile.open(archive) as tar:
            members = {member.name: member for member in tar.getmembers() if member.isfile()}
            for name, path in destinations(members):
                path.parent.mkdir(parents=True, exist_ok=True)
                content = tar.extractfile(members[name])
                assert content is not None
                with content, path.open("wb") as out:
                    shutil.copyfileobj(content, out)
    except (OSError, EOFError, ValueError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise DataError(f"{archive}: cannot be unpacked ({error}); download it again") from error


def _read_questions(benchmark: Benchmark, files: Sequence[_File]) -> Questions:
    result, ids = Questions(benchmark), Counter[str]()
    for file in files:
        path = file.path
        for line, row in _rows(path, result.invalid):
            try:
                split = file.split or str(row.get("split") or benchmark.split)
                if split not in ("dev", benchmark.split):
                    continue
                subject = file.subject or str(row.get("subject") or path.stem)
                question = _parse_question(row, subject, line)
            except ValueError as error:
                result.invalid.add(path, line, str(error), row)
                continue
            result.invalid.num_valid += 1
            ids[question.id] += 1
            if ids[question.id] > 1:  # results are stored by id
                question = replace(question, id=f"{question.id} ({ids[question.id]})")
            if split == benchmark.split:
                result.questions.append(question)
            else:
                result.examples.setdefault(question.subject, []).append(question)
    if not result.questions:
        detail = f"; the first invalid row: {result.invalid.first}" if result.invalid.total else ""
        raise DataError(f"{files[0].path}: contains no question with an answer{detail}")
    return result


def _rows(path: Path, invalid: InvalidRecords) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, row)."""
    if _data_suffix(path) == ".csv":
        yield from _csv_rows(path, invalid)
    else:
        for _, line, row in read_objects([path], invalid=invalid):
            yield line, row


def _parse_question(row: dict[str, Any], subject: str, line: int) -> Question:
    """Build a question from a row. Raises ValueError with the reason if it is not valid."""
    fields = {str(name).strip().lower(): value for name, value in row.items() if name is not None}
    text = _to_text(fields.get("question"))
    if not text.strip():
        raise ValueError("no question")
    options: list[str] = []
    for letter in LETTERS:
        option = _to_text(fields.get(letter.lower()))
        if not option.strip():
            break
        options.append(option)
    if len(options) < 2:
        raise ValueError("fewer than two options (columns A, B, …)")
    answer = _to_text(fields.get("answer")).strip().upper()
    if len(answer) != 1 or answer not in LETTERS[: len(options)]:
        raise ValueError(f"the answer {answer[:20]!r} is not the letter of an option")
    name = _to_text(fields.get("id")).strip() or str(line)
    # Published CSV files number the questions of each subject from 0.
    question_id = name if subject in name or not subject else f"{subject}-{name}"
    return Question(
        question_id,
        subject,
        text,
        tuple(options),
        LETTERS.index(answer),
        _to_text(fields.get("passage")),
    )


def _to_text(value: Any) -> str:
    return "" if value is None else str(value)


def _csv_rows(path: Path, invalid: InvalidRecords) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, row); without a header, the columns are in MMLU's order."""
    csv.field_size_limit(_MAX_FIELD_CHARACTERS)
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(
            f"{path}: not UTF-8; convert it: iconv -f GB18030 -t UTF-8 OLD > NEW"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    reader = csv.reader(io.StringIO(text, newline=""))
    header: list[str] | None = None
    try:
        for row in reader:
            if header is None:
                names = [name.strip().lower() for name in row]
                if {"question", "answer"} <= set(names):
                    header = names
                    continue
                header = list(_MMLU_COLUMNS)
            if row and len(row) != len(header):
                invalid.add(
                    path, reader.line_num, f"{len(row)} fields instead of {len(header)}", row
                )
            elif row:
                yield reader.line_num, dict(zip(header, row, strict=True))
    except csv.Error as error:
        invalid.add(path, reader.line_num, f"not CSV: {error}")
