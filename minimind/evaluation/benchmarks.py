"""Multiple-choice benchmarks, read from the layouts in which they are published.

    <name>.jsonl (.zst, .gz, …)       one question per line: {"id", "subject", "split", "question",
                                      "A", "B", …, "answer"}, optionally with "passage"
    {dev,val,test}/<subject>_val.csv  C-Eval and MMLU
    {dev,test}/<subject>.csv          CMMLU
    a .zip or .tar.* of these         as downloaded
    FILE.csv (.zst, .gz, …)           any questions, with the columns question, A, B, …, answer

MMLU's files have no header. The questions of the split "dev" are few-shot examples for the others.

The benchmarks share names of subjects. So a folder whose name begins with that of a benchmark has
only files of that one; tables in other folders are those of the benchmark that they are most like.
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
from typing import IO, Any

from minimind.data.compression import DAMAGED, CountedFile, as_data_errors, open_decompressed
from minimind.data.input_files import COMPRESSIONS, format_of, walk_files
from minimind.data.invalid import CONVERT_TO_UTF_8, NOT_UTF_8, InvalidRecords
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
    """A benchmark: its evaluated split, its language, and the names of its folders.

    split_in_name: the names of its CSV files end in the split.
    """

    name: str
    split: str
    language: str
    folders: tuple[str, ...] = ()
    split_in_name: bool = True


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("ceval", "val", "zh", ("ceval", "ceval-exam")),
        Benchmark("cmmlu", "test", "zh", ("cmmlu",), split_in_name=False),
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


def is_archive(name: str) -> bool:
    """Return True for the name of an archive, which may contain several benchmarks."""
    return name.endswith(_ARCHIVES)


@contextmanager
def _find_files(benchmark: Benchmark | None, source: Path) -> Iterator[list[_File]]:
    """Find the files of a benchmark in a file, folder or archive."""
    if source.is_file() and not is_archive(source.name):
        yield [_File(None, None, source)]
        return
    if benchmark is None:
        raise DataError(f"{source}: give a file with the columns question, A, B, …, answer")
    if source.is_dir():
        records = sorted(
            path
            for path in source.glob(f"{benchmark.name}.*")
            if format_of(path) in (".jsonl", ".json")
        )
        if records:
            yield [_File(None, None, records[0])]
            return
        if tables := _find_tables(benchmark, source, source.absolute().name):
            yield tables
            return
        names = (benchmark.name, *benchmark.folders)
        archives = [
            path
            for path in sorted(source.iterdir())
            if is_archive(path.name) and path.name.startswith(names)
        ]
    else:
        archives = [source]
    if not archives:
        yield []
        return
    with tempfile.TemporaryDirectory() as folder:
        _unpack(benchmark, archives[0], Path(folder))
        yield _find_tables(benchmark, Path(folder), archives[0].name)


def _find_tables(benchmark: Benchmark, folder: Path, name: str) -> list[_File]:
    """Find a benchmark's CSV files in its own folder, in `data`, or anywhere below `folder`.

    name: the name of the folder, or of the archive that was unpacked into it.
    """
    for root in [*(folder / name for name in (*benchmark.folders, "data")), folder]:
        groups: dict[Path, list[_File]] = {}  # by the folder that contains dev, val and test
        for path in sorted(walk_files(root)) if root.is_dir() else ():
            if match := _TABLES.fullmatch(path.relative_to(folder).as_posix()):
                file = _File(match[1].lower(), match[2], path)
                groups.setdefault(path.parent.parent, []).append(file)
        files = [
            file
            for parent, group in groups.items()
            if _has_tables_of(benchmark, name, parent.relative_to(folder).parts, group)
            for file in group
            if file.subject in subjects(benchmark.name)
        ]
        if any(file.split == benchmark.split for file in files):
            return sorted(files, key=lambda file: file.path)
    return []


def _has_tables_of(
    benchmark: Benchmark, name: str, parts: Sequence[str], tables: Sequence[_File]
) -> bool:
    """Return True if tables in the folder `parts` below the folder `name` are of the benchmark."""
    if owner := _owner(parts):
        return owner is benchmark
    if _owner([name]) is benchmark:
        return True

    def similarity(other: Benchmark) -> tuple[int, int]:
        known = subjects(other.name)
        named_alike = [(file.path.stem != file.subject) == other.split_in_name for file in tables]
        return len({file.subject for file in tables if file.subject in known}), sum(named_alike)

    others = (other for other in BENCHMARKS.values() if other is not benchmark)
    return all(similarity(benchmark) > similarity(other) for other in others)


def _owner(parts: Sequence[str]) -> Benchmark | None:
    """Return the benchmark that the last of the folder names that begin with one's name names."""
    for part in reversed(parts):
        for benchmark in BENCHMARKS.values():
            if part.lower().startswith(benchmark.folders):
                return benchmark
    return None


def _unpack(benchmark: Benchmark, archive: Path, folder: Path) -> None:
    """Unpack the CSV files of an archive, except those in folders of other benchmarks.

    Raises DataError if the archive is damaged or encrypted.
    """

    def destinations(names: Iterable[str]) -> list[tuple[str, Path]]:
        """Return (member, destination); the member's own path could lead out of the folder."""
        tables: dict[Path, str] = {}
        for name in names:
            match = _TABLES.fullmatch(name)
            if match and _owner(name.split("/")[:-2]) in (None, benchmark):
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
                    if packed.getinfo(name).flag_bits & 1:
                        raise DataError(f"{archive}: {name} is encrypted; unpack it into a folder")
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
    except (*DAMAGED, ValueError, tarfile.TarError) as error:
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
    if format_of(path) == ".csv":
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
        with as_data_errors(path), path.open("rb") as raw:
            stream: IO[bytes] = raw
            if path.suffix.lower() in COMPRESSIONS:
                stream = open_decompressed(path, CountedFile(raw, lambda _: None))
            text = stream.read().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path}: {NOT_UTF_8}; {CONVERT_TO_UTF_8.format('GB18030')}") from None
    reader = csv.reader(io.StringIO(text, newline=None))  # line breaks in fields become "\n"
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
