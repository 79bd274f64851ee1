"""Files of many kinds, read as one stream of records; bad lines are put aside, not fatal.

Nothing is held in memory but the record at hand (for Parquet a row group, for one .json file
the whole of it, up to a limit).
"""

import bz2
import contextlib
import csv
import glob
import gzip
import io
import json
import lzma
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from minimind.data.schemas import Record, convert
from minimind.errors import DataError

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bzip2"}
_FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
_MAX_LINE = 16 << 20  # bytes; a longer line is no record
_MAX_JSON = 256 << 20  # bytes of a file that is one JSON value
_MAX_DOCUMENT = 1 << 16  # characters of running text a record
_EXCERPT = 200
_ENOUGH = 100  # records before a share of bad lines means something

Progress = Callable[[int], None]


@dataclass
class BadLines:
    """Lines that are no records: counted by reason, and put aside in `path` if it is given."""

    path: Path | None = None
    good: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    first: str = ""

    @property
    def total(self) -> int:
        """Lines put aside."""
        return sum(self.reasons.values())

    def add(self, file: Path, line: int, reason: str, text: str = "") -> None:
        """Put one line aside."""
        self.first = self.first or f"{file}:{line}: {reason}"
        self.reasons[reason] += 1
        if self.path:
            entry = {"file": str(file), "line": line, "reason": reason, "text": text[:_EXCERPT]}
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as stream:
                stream.write(json.dumps(entry) + "\n")

    def check(self, max_fraction: float, *, final: bool = False) -> None:
        """Raise DataError when more than `max_fraction` of the lines so far are bad."""
        seen = self.good + self.total
        if self.total and (final or seen >= _ENOUGH) and self.total > max_fraction * seen:
            reasons = ", ".join(f"{n:,} × {reason}" for reason, n in self.reasons.most_common(3))
            where = f" All of them are in {self.path}." if self.path else ""
            raise DataError(
                f"{self.total:,} of {seen:,} lines are bad ({reasons}); the first: {self.first}."
                f"{where} Mend the file, name its schema with data.record_schema=…, or allow more "
                "with data.max_bad_fraction=…"
            )


def list_files(path: str) -> list[Path]:
    """The files that `path` means: a file, a folder (all readable files below it), or a glob.

    Raises DataError when there are none.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return [place]
    if place.is_dir():
        files = sorted(p for p in place.rglob("*") if p.is_file() and _format(p) is not None)
        if not files:
            raise DataError(
                f"{path}: the folder holds no file that can be read; known are "
                f"{' '.join(_FORMATS)}, each also with {' '.join(_COMPRESSIONS)}"
            )
        return files
    files = sorted(Path(p) for p in glob.glob(str(place), recursive=True) if Path(p).is_file())
    if not files:
        near = next((p for p in place.parents if p.is_dir()), Path("."))
        raise DataError(f"{path}: there is no such file or folder (but there is {near})")
    return files


def read_records(
    files: Iterable[Path], *, bad: BadLines, schema: str = "auto", progress: Progress | None = None
) -> Iterator[Record]:
    """All records of the files, in order.

    `progress(n)` is called with the number of bytes of the files read since the last call.
    Raises DataError for a file that cannot be read at all.
    """
    for file in files:
        for line, value in _values(file, bad, progress or (lambda num_bytes: None)):
            try:
                record = convert(value, schema) if isinstance(value, dict) else _loose(value)
            except ValueError as error:
                bad.add(file, line, str(error), _excerpt(value))
                continue
            bad.good += 1
            yield record


def read_texts(
    files: Iterable[Path], *, bad: BadLines, progress: Progress | None = None
) -> Iterator[str]:
    """What is written in all records, whatever their schema."""
    return (record.as_text() for record in read_records(files, bad=bad, progress=progress))


def _loose(value: Any) -> Record:
    """A JSON line that is not an object."""
    if isinstance(value, str) and value.strip():
        return Record(text=value)
    raise ValueError(f"a JSON {type(value).__name__} instead of an object")


def _excerpt(value: Any) -> str:
    with contextlib.suppress(ValueError, RecursionError):
        return json.dumps(value, ensure_ascii=False, default=str)[:_EXCERPT]
    return ""


def _format(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in _FORMATS else None


def _values(file: Path, bad: BadLines, progress: Progress) -> Iterator[tuple[int, Any]]:
    """(line or row number, value) of each record of one file."""
    kind = _format(file)
    if kind is None:
        raise DataError(
            f"{file}: unknown kind of file; known are {' '.join(_FORMATS)}, "
            f"each also with {' '.join(_COMPRESSIONS)}"
        )
    readers = {".json": _json, ".csv": _csv, ".tsv": _csv, ".txt": _plain_text}
    try:
        if file.stat().st_size == 0:
            raise DataError(f"{file}: the file is empty")
        with file.open("rb") as raw:
            counted = _Counted(raw, progress)
            if kind == ".parquet":
                yield from _parquet(file, raw, counted)
            else:
                with _decompressed(file, counted) as stream:
                    yield from readers.get(kind, _json_lines)(file, stream, bad)
            counted.report()
    except (OSError, EOFError, lzma.LZMAError, _zstd_error()) as error:
        raise DataError(_cannot_read(file, error)) from error


def _cannot_read(file: Path, error: BaseException) -> str:
    if isinstance(error, PermissionError):
        return f"{file}: no permission to read it"
    if file.suffix.lower() in _COMPRESSIONS:
        kind = _COMPRESSIONS[file.suffix.lower()]
        return (
            f"{file}: cannot be read as {kind}: {error}. Is it damaged, cut short, "
            "or compressed in another way than its name says?"
        )
    return f"{file}: cannot be read: {error}"


def _zstd_error() -> type[Exception]:
    import zstandard

    return zstandard.ZstdError


class _Counted(io.RawIOBase):
    """A file that reports how much of it has been read."""

    def __init__(self, raw: IO[bytes], progress: Progress) -> None:
        self._raw, self._progress, self._reported = raw, progress, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._raw.readinto(buffer)  # type: ignore[attr-defined]
        self.report()
        return int(count)

    def report(self) -> None:
        """Report what was read since the last time."""
        place = self._raw.tell()
        self._progress(place - self._reported)
        self._reported = place


@contextlib.contextmanager
def _decompressed(file: Path, counted: io.RawIOBase) -> Iterator[IO[bytes]]:
    raw = io.BufferedReader(counted, 1 << 20)
    kind = _COMPRESSIONS.get(file.suffix.lower())
    if kind == "gzip":
        yield gzip.GzipFile(fileobj=raw)
    elif kind == "xz":
        yield lzma.LZMAFile(raw)
    elif kind == "bzip2":
        yield bz2.BZ2File(raw)
    elif kind == "zstd":
        import zstandard

        unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 27)
        unpacked = unpacker.stream_reader(raw, read_across_frames=True)
        yield io.BufferedReader(unpacked, 1 << 20)  # type: ignore[arg-type]
        # A stream that was cut ends quietly, so look whether the last frame was whole.
    else:
        yield raw


def _lines(file: Path, stream: IO[bytes], bad: BadLines) -> Iterator[tuple[int, str]]:
    """Lines split at "\\n" alone; those that are too long or not UTF-8 are put aside."""
    number = 0
    while line := stream.readline(_MAX_LINE):
        number += 1
        if not line.endswith(b"\n") and len(line) >= _MAX_LINE:
            start = line[:_EXCERPT].decode("utf-8", "replace")
            while (rest := stream.readline(_MAX_LINE)) and not rest.endswith(b"\n"):
                pass
            bad.add(file, number, f"a line of more than {_MAX_LINE >> 20} MB", start)
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # the byte order mark some editors write
        try:
            yield number, line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            bad.add(file, number, "not UTF-8", line[:_EXCERPT].decode("utf-8", "replace"))


def _json_lines(file: Path, stream: IO[bytes], bad: BadLines) -> Iterator[tuple[int, Any]]:
    for number, line in _lines(file, stream, bad):
        if not line.strip():
            continue
        try:
            yield number, parse_json(line)
        except ValueError as error:
            bad.add(file, number, str(error), line)


def parse_json(text: str) -> Any:
    """Strict JSON. Raises ValueError with the reason: what the standard leaves open is refused."""
    try:
        value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if "\\u0000" in text or "\x00" in text:
        raise ValueError("a NUL character")
    if "\\ud" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("half a UTF-16 pair (lone surrogate)") from None
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key that comes twice")
    return value


def _json(file: Path, stream: IO[bytes], bad: BadLines) -> Iterator[tuple[int, Any]]:
    """A file that is one JSON value: a list of records, or one record; JSON lines are taken too."""
    text = stream.read(_MAX_JSON + 1)
    if len(text) > _MAX_JSON:
        raise DataError(
            f"{file}: a .json file must be held in memory whole, and this one has more than "
            f"{_MAX_JSON >> 20} MB. Convert it to one record a line (.jsonl)"
        )
    try:
        value = parse_json(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 (byte {error.start})") from None
    except ValueError as error:
        if "Extra data" in str(error):  # one record a line under the wrong name
            yield from _json_lines(file, io.BytesIO(text), bad)
            return
        raise DataError(f"{file}: {error}") from None
    yield from enumerate(value if isinstance(value, list) else [value], 1)


def _csv(file: Path, stream: IO[bytes], bad: BadLines) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(_MAX_LINE)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    tabs = ".tsv" in [suffix.lower() for suffix in file.suffixes]
    rows = csv.reader(text, delimiter="\t" if tabs else ",")
    header: list[str] | None = None
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            bad.add(file, rows.line_num, f"not CSV: {error}")
            continue
        if header is None:
            header = [name.strip() for name in row]
        elif row:
            joined = "".join(row)
            if len(row) != len(header):
                reason = f"{len(row)} fields where the header has {len(header)}"
                bad.add(file, rows.line_num, reason, joined)
            elif not joined.isprintable() and _is_damaged(joined):
                bad.add(file, rows.line_num, "not UTF-8, or a NUL character")
            else:
                yield rows.line_num, dict(zip(header, row, strict=True))


def _is_damaged(text: str) -> bool:
    return "\x00" in text or any("\udc80" <= character <= "\udcff" for character in text)


def _plain_text(file: Path, stream: IO[bytes], bad: BadLines) -> Iterator[tuple[int, Any]]:
    """Running text as documents of bounded size, cut at blank lines where there are any."""
    lines: list[str] = []
    size = start = 0
    for number, line in _lines(file, stream, bad):
        if "\x00" in line:
            bad.add(file, number, "a NUL character", line)
            continue
        start = start or number
        lines.append(line)
        size += len(line) + 1
        if size >= _MAX_DOCUMENT or (not line.strip() and size >= _MAX_DOCUMENT // 2):
            yield start, {"text": "\n".join(lines)}
            lines, size, start = [], 0, 0
    if "".join(lines).strip():
        yield start, {"text": "\n".join(lines)}


def _parquet(file: Path, raw: IO[bytes], counted: _Counted) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(raw)
        number = 0
        for batch in table.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield number, row
            counted.report()
    except pyarrow.ArrowException as error:
        raise DataError(f"{file}: cannot be read as Parquet: {error}") from error


