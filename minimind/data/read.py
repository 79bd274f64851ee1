"""Files of many kinds, read as one stream of records; bad lines are put aside, not fatal.

Nothing is held in memory but the record at hand (and for Parquet, a part of a row group).
"""

import bz2
import codecs
import contextlib
import csv
import difflib
import glob
import gzip
import io
import json
import lzma
import os
import re
import shlex
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import IO, Any

import zstandard

from minimind.data.schemas import Record, convert
from minimind.data.strict_json import check_characters, parse_json
from minimind.errors import DataError, ResourceError
from minimind.paths import expand_user

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bzip2"}
_FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
_KNOWN = f"known are {' '.join(_FORMATS)}, each also with {' '.join(_COMPRESSIONS)}"
_MAGIC = {
    "gzip": re.compile(rb"\x1f\x8b"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
    "xz": re.compile(rb"\xfd7zXZ\0"),
    "bzip2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
}
_MAX_LINE = 16 << 20  # bytes; a longer line is no record
_MAX_ROW = 1 << 20  # characters of a CSV row of several lines; more is a quote that never ends
_MAX_PACKED_PARQUET = 256 << 20  # bytes; Parquet is read from its end, so it is unpacked whole
_MAX_DOCUMENT = 1 << 16  # characters of running text a record
READ_AHEAD = 1 << 20
_PACKED_AHEAD = 1 << 16  # of compressed files, so that what is read is not far ahead of records
_PACKED = 1 << 12  # bytes of zstd at once; they may unpack to 30,000 times as many
_BATCH_RECORDS = 512
_BATCH_CHARACTERS = 1 << 20
_EXCERPT = 200
_ENOUGH = 1000  # lines before a share of bad ones means something
_MOST_KEPT = 10_000  # bad lines put aside in a file
_MOST_REASONS = 100
_FIRST_PLACES = 3
_BOM = "\ufeff"
_NOT_UTF_8 = "not UTF-8"
_TO_UTF_8 = "convert it: iconv -f {} -t UTF-8 OLD > NEW"

Progress = Callable[[int], None]


@dataclass
class InvalidRecords:
    """Lines that are no records: counted by reason, the first of them put aside in `path`.

    More than `max_fraction` of them stop the reading with a DataError.
    """

    path: Path | None = None
    max_fraction: float = 1.0
    good: int = 0
    total: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)  # the first of each reason
    first: str = ""

    def add(self, file: Path, line: int, reason: str, content: Any = "") -> None:
        """Put one line aside. Raises DataError when they are too many by now."""
        # Names of fields and the like come from the file, and are to be printed.
        reason = "".join(c if c.isprintable() else "\ufffd" for c in reason[:_EXCERPT])
        self.first = self.first or f"{file}:{line}: {reason}"
        kind = reason
        if kind not in self.reasons and len(self.reasons) >= _MOST_REASONS:
            kind = "another reason"
        self.reasons[kind] += 1
        self.total += 1
        places = self.places.setdefault(kind, [])
        if len(places) < _FIRST_PLACES:
            places.append(f"{file}:{line}")
        if self.path and self.total <= _MOST_KEPT:
            self._keep({"file": str(file), "line": line, "reason": reason}, content)
        self.check(self.max_fraction)

    def merge(self, other: "InvalidRecords") -> None:
        """Count the lines of `other` in, without writing or checking anything."""
        self.good += other.good
        self.total += other.total
        self.first = self.first or other.first
        self.reasons.update(other.reasons)
        for reason, places in other.places.items():
            self.places[reason] = (self.places.get(reason, []) + places)[:_FIRST_PLACES]

    def _keep(self, entry: dict[str, Any], content: Any) -> None:
        assert self.path
        entry["text"] = _excerpt(content)
        try:
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as stream:
                stream.write(json.dumps(entry, ensure_ascii=False) + "\n")
        except OSError as error:
            raise ResourceError(
                f"{self.path}: cannot put a bad line aside ({error.strerror}); "
                "free some space, or give another folder with data.store=DIR"
            ) from error

    def check(self, max_fraction: float, *, final: bool = False) -> None:
        """Raise DataError when more than `max_fraction` of the lines so far are bad."""
        seen = self.good + self.total
        if self.total <= max_fraction * seen or not (final or seen >= _ENOUGH):
            return
        reasons = ", ".join(f"{n:,} × {reason}" for reason, n in self.reasons.most_common(3))
        where = hint = ""
        if self.path:
            kept = "They" if self.total <= _MOST_KEPT else f"The first {_MOST_KEPT:,}"
            where = f" {kept} are in {self.path}."
        if _NOT_UTF_8 in self.reasons:
            hint = f" If the file is GBK, {_TO_UTF_8.format('GB18030')}."
        raise DataError(
            f"{self.total:,} of {seen:,} lines are bad ({reasons}); the first: {self.first}."
            f"{where}{hint} Fix the file (`minimind data inspect` shows what is in it), name its "
            'schema with data.sources=[{path="FILE", schema="NAME"}], or allow more with '
            "data.max_invalid_fraction=…"
        )


def list_files(path: str) -> list[Path]:
    """The files that `path` means: a file, a folder (all readable files below it), or a glob.

    A name that exists is itself, whatever it looks like: with a folder `[v1]` there, `[v1]/*.jsonl`
    means the files in it. Hidden files are not looked at. Raises DataError when there are none.
    """
    place = expand_user(path)
    try:
        if place.is_file():
            return [place]
        if place.is_dir():
            found = list(_walk(place))
        elif glob.has_magic(str(place)):
            found = _matches(place)
        else:
            raise DataError(f"{path}: there is no such file or folder{_near(path, place)}")
        files = sorted(p for p in found if _format(p) is not None and p.is_file())
    except PermissionError as error:
        raise DataError(f"{error.filename or path}: no permission to read it") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    if files:
        return files
    if place.is_dir():
        raise DataError(f"{path}: the folder holds no file that can be read; {_KNOWN}")
    if found:
        raise DataError(f"{path}: none of the {len(found):,} files can be read; {_KNOWN}")
    raise DataError(f"{path}: no file matches{_several(path)}")


def _matches(pattern: Path) -> list[Path]:
    """What a glob matches. In each folder a name that is there wins over what it would match."""
    found = [Path(pattern.anchor)]
    for part in pattern.relative_to(pattern.anchor).parts:
        following: list[Path] = []
        for folder in found:
            if (folder / part).exists():
                following.append(folder / part)
            elif glob.has_magic(part):
                inside = os.path.join(glob.escape(str(folder)), part)
                following += map(Path, glob.glob(inside, recursive=True))
        found = list(dict.fromkeys(following))
    return found


def _walk(folder: Path) -> Iterator[Path]:
    """All files below `folder`. Raises OSError for a folder that may not be looked into."""

    def fail(error: OSError) -> None:
        raise error

    for here, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(here, name) for name in names if not name.startswith("."))


def _near(path: str, place: Path) -> str:
    """What there is instead of `place`."""
    if several := _several(path):
        return several
    folder = next(p for p in place.parents if p.is_dir())
    missing = place.relative_to(folder).parts[0]
    names = [p.name for p in folder.iterdir()]
    similar = difflib.get_close_matches(missing, names, n=3)
    if similar:
        return f"; {folder} holds {', '.join(similar)}"
    return f"; the folder {folder} exists, but holds no {missing}"


def _several(path: str) -> str:
    """What to do where `path` is several paths, separated by commas or spaces."""
    parts = [part for part in re.split(r"[,，;\s]+", path) if part]
    if len(parts) < 2 or not any(map(os.path.exists, parts)):
        return ""
    options = " ".join(f"--data {shlex.quote(part)}" for part in parts)
    return f". Give each path by itself: repeat --data ({options}), or separate arguments by spaces"


def read_records(
    files: Iterable[Path],
    *,
    bad: InvalidRecords,
    schema: str = "auto",
    progress: Progress | None = None,
) -> Iterator[Record]:
    """All records of the files, in order.

    `progress(n)` is called with the number of bytes of the files read since the last call.
    Raises DataError for a file that cannot be read at all, or holds nothing, and when more than
    `bad.max_fraction` of the lines are bad.
    """
    for file in files:
        before = bad.good + bad.total
        for line, value in _values(file, bad, progress or (lambda num_bytes: None)):
            try:
                record = convert(value, schema) if isinstance(value, dict) else _loose(value)
            except ValueError as error:
                bad.add(file, line, str(error), value)
                continue
            bad.good += 1
            yield record
        if bad.good + bad.total == before:
            raise DataError(f"{file}: there is no record in it; leave it out, or get it again")


def read_objects(
    files: Iterable[Path], *, bad: InvalidRecords
) -> Iterator[tuple[Path, int, dict[str, Any]]]:
    """(file, line, object) of files whose records are of other schemas than training data's.

    Lines that are no objects are put aside; the caller counts the good ones. Raises DataError for
    a file that cannot be read at all.
    """
    for file in files:
        for line, value in _values(file, bad, lambda num_bytes: None):
            if isinstance(value, dict):
                yield file, line, value
            else:
                bad.add(file, line, f"a JSON {type(value).__name__} instead of an object", value)


def first_record(path: str, schema: str = "auto") -> Record:
    """The first record of what `path` means. Raises DataError when there is none."""
    bad = InvalidRecords()
    for record in read_records(list_files(path), bad=bad, schema=schema):
        return record
    raise DataError(f"{path}: no line is a record; the first: {bad.first}")


def read_texts(
    files: Iterable[Path], *, bad: InvalidRecords, progress: Progress | None = None
) -> Iterator[str]:
    """What is written in all records, whatever their schema."""
    return (record.as_text() for record in read_records(files, bad=bad, progress=progress))


def batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Records by the hundred, fewer where they are long."""
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += sum(map(len, record.texts))
        if len(batch) >= _BATCH_RECORDS or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _loose(value: Any) -> Record:
    """A record that is not an object: running text."""
    if isinstance(value, str) and value.strip():
        return Record(text=value)
    raise ValueError(f"a JSON {type(value).__name__} instead of an object")


def _excerpt(content: Any) -> str:
    if isinstance(content, bytes):
        content = content[: _EXCERPT * 4].decode("utf-8", "backslashreplace")
    if not isinstance(content, str):
        try:
            content = json.dumps(content, ensure_ascii=False, default=str)
        except (ValueError, RecursionError):
            return ""
    return content[:_EXCERPT]


def _format(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in _FORMATS else None


def _values(file: Path, bad: InvalidRecords, progress: Progress) -> Iterator[tuple[int, Any]]:
    """(line, value) of each record of one file; for Parquet its row."""
    kind = _format(file)
    if kind is None:
        raise DataError(f"{file}: unknown kind of file; {_KNOWN}")
    readers = {".json": _json, ".csv": _csv, ".tsv": _tsv, ".txt": _plain_text}
    compression = _COMPRESSIONS.get(file.suffix.lower())
    try:
        with file.open("rb") as raw:
            counted = _Counted(raw, progress)
            stream = _buffered(counted, READ_AHEAD if compression is None else _PACKED_AHEAD)
            _check_compression(file, compression, stream)
            if compression is not None:
                stream = _unpack(stream, compression)
            if kind == ".parquet":
                source = raw if compression is None else _in_memory(file, stream)
                yield from _parquet(file, source, bad, counted)
            else:
                _check_text(file, stream)
                yield from readers.get(kind, _json_lines)(file, stream, bad)
            counted.report(file.stat().st_size)
    except PermissionError as error:
        raise DataError(f"{file}: no permission to read it") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        cause = f" as {compression}: it is damaged or cut short" if compression else ""
        raise DataError(f"{file}: cannot be read{cause} ({_line(error)}); get it again") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _check_compression(file: Path, expected: str | None, stream: io.BufferedReader) -> None:
    head = stream.peek(READ_AHEAD)
    if not head:
        raise DataError(f"{file}: the file is empty; leave it out, or get it again")
    found = next((name for name, magic in _MAGIC.items() if magic.match(head)), None)
    if found == expected:
        return
    says = f"its name says {expected}" if expected else "its name does not say so"
    endings = {name: ending for ending, name in _COMPRESSIONS.items()}
    if found:
        raise DataError(
            f"{file}: it is compressed with {found}, but {says}; "
            f"give it a name that ends in {endings[found]}"
        )
    raise DataError(f"{file}: {says}, but it is not; is it not compressed at all, or damaged?")


def _check_text(file: Path, stream: io.BufferedReader) -> None:
    head = stream.peek(READ_AHEAD)[:4096]
    if not head:
        raise DataError(f"{file}: there is nothing in it; leave it out, or get it again")
    if head.startswith(b"PAR1"):
        raise DataError(f"{file}: it is Parquet inside; give it a name that ends in .parquet")
    # Text without a byte order mark still shows: each Latin letter or sign has a zero byte.
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or head.count(0) * 8 > len(head):
        raise DataError(
            f"{file}: not UTF-8, but UTF-16 or no text at all; {_TO_UTF_8.format('UTF-16')}"
        )


class _Counted(io.RawIOBase):
    """A file that reports how much of it has been read."""

    def __init__(self, raw: IO[bytes], progress: Progress) -> None:
        self._raw, self._progress, self._reported = raw, progress, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._raw.readinto(buffer)  # type: ignore[attr-defined]
        self.report(self._reported + count)
        return int(count)

    def report(self, place: int) -> None:
        """Report that the file has been read up to the byte `place`."""
        if place > self._reported:
            self._progress(place - self._reported)
            self._reported = place


def _unpack(packed: io.BufferedReader, compression: str) -> io.BufferedReader:
    if compression == "zstd":
        return _buffered(_Joined(_unpack_zstd(packed)))
    openers: dict[str, Any] = {"gzip": gzip.open, "xz": lzma.open, "bzip2": bz2.open}
    return _buffered(openers[compression](packed))


def _buffered(stream: Any, size: int | None = None) -> io.BufferedReader:
    return io.BufferedReader(stream, size or READ_AHEAD)


def _unpack_zstd(packed: IO[bytes]) -> Iterator[bytes]:
    """The frames of a zstd stream. Raises EOFError when the last one is cut short."""
    # The library's own reader takes the end of the file for the end of the stream.
    unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 27)
    frame = unpacker.decompressobj()
    while piece := packed.read(_PACKED):
        while piece:
            if frame.eof:
                frame = unpacker.decompressobj()
            yield frame.decompress(piece)
            piece = frame.unused_data
    if not frame.eof:
        raise EOFError("the stream ends before its end marker")


class _Joined(io.RawIOBase):
    """Pieces of bytes as one file."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._rest = pieces, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = memoryview(piece)
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


def _in_memory(file: Path, stream: IO[bytes]) -> IO[bytes]:
    content = stream.read(_MAX_PACKED_PARQUET + 1)
    if len(content) > _MAX_PACKED_PARQUET:
        raise DataError(
            f"{file}: compressed Parquet of more than {_MAX_PACKED_PARQUET >> 20} MB; "
            "unpack it first (Parquet is compressed inside)"
        )
    return io.BytesIO(content)


def _raw_lines(stream: IO[bytes], first: bytes = b"") -> Iterator[tuple[int, bytes]]:
    """Numbered lines, split at "\\n" alone; of one that is too long, the first part."""
    number = 0
    while line := first or stream.readline(_MAX_LINE + 1):
        first, number = b"", number + 1
        if len(line) > _MAX_LINE:
            rest = line
            while rest and not rest.endswith(b"\n"):
                rest = stream.readline(READ_AHEAD)
        yield number, line


def _json_lines(
    file: Path, stream: io.BufferedReader, bad: InvalidRecords, first: bytes = b""
) -> Iterator[tuple[int, Any]]:
    for number, line in _raw_lines(stream, first):
        if len(line) > _MAX_LINE:
            bad.add(file, number, f"a line of more than {_MAX_LINE >> 20} MB", line)
            continue
        try:
            text = line.decode("utf-8").removeprefix(_BOM)
            if text and not text.isspace():
                yield number, parse_json(text)
        except UnicodeDecodeError:
            bad.add(file, number, _NOT_UTF_8, line)
        except ValueError as error:
            bad.add(file, number, str(error), line)


def _json(file: Path, stream: io.BufferedReader, bad: InvalidRecords) -> Iterator[tuple[int, Any]]:
    """A list of records, or one record after the other; often it is one a line."""
    first = stream.readline(_MAX_LINE + 1)
    if _is_object(first):
        yield from _json_lines(file, stream, bad, first)
        return
    try:
        for line, text in _json_pieces(file, stream, first):
            try:
                value = parse_json(text)
            except ValueError as error:
                bad.add(file, line, str(error), text)
            else:
                yield line, value
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: {_NOT_UTF_8} ({error.reason}); if it is GBK, {_TO_UTF_8.format('GB18030')}"
        ) from None


def _is_object(line: bytes) -> bool:
    with contextlib.suppress(ValueError):
        return isinstance(parse_json(line.decode("utf-8-sig")), dict)
    return False


def _json_pieces(file: Path, stream: IO[bytes], first: bytes) -> Iterator[tuple[int, str]]:
    """(line, text) of each member of a list, or of values that follow each other.

    Raises DataError where it is not JSON: in a list nobody knows where the next member begins.
    """
    decode = codecs.getincrementaldecoder("utf-8-sig")().decode
    chunks = chain([first], iter(lambda: stream.read(READ_AHEAD), b""))
    find_end = json.JSONDecoder().raw_decode
    text, at, line = "", 0, 1
    in_list = closed = False

    def fill() -> bool:
        nonlocal text, at
        chunk = next(chunks, b"")
        text, at = text[at:] + decode(chunk, final=not chunk), 0
        return bool(chunk)

    gap = re.compile(r"[ \t\r\n]*")
    fill()
    while True:
        end = gap.match(text, at).end()  # type: ignore[union-attr]
        line, at = line + text.count("\n", at, end), end
        if at == len(text):
            if fill():
                continue
            break
        if closed:
            raise DataError(f"{file}: line {line}: something follows the end of the list")
        if not in_list and text[at] == "[":
            in_list, at, gap = True, at + 1, re.compile(r"[ \t\r\n,]*")
        elif in_list and text[at] == "]":
            closed, at = True, at + 1
        else:
            try:
                end = find_end(text, at)[1]
                if end == len(text) and fill():  # a number may go on
                    continue
            except (json.JSONDecodeError, RecursionError) as error:
                if len(text) - at <= _MAX_LINE and fill():
                    continue
                reason = getattr(error, "msg", "nested too deeply")
                raise DataError(
                    f"{file}: line {line}: not JSON: {reason}, in the record that begins here. "
                    "Mend it, or convert the file to one record a line (.jsonl)"
                ) from None
            yield line, text[at:end]
            line, at = line + text.count("\n", at, end), end
    if in_list and not closed:
        raise DataError(f"{file}: cut short: the list that is the file does not end; get it again")


def _csv(
    file: Path, stream: io.BufferedReader, bad: InvalidRecords, delimiter: str = ","
) -> Iterator[tuple[int, Any]]:
    rows = _rows(file, stream, bad, delimiter)
    before = bad.total
    first, header = next(rows, (0, []))
    if bad.total > before or not _is_utf_8("".join(header)):
        raise DataError(
            f"{file}: the header, which names the columns, is not CSV in UTF-8; "
            f"if it is GBK, {_TO_UTF_8.format('GB18030')}"
        )
    if len(set(header)) < len(header):
        raise DataError(f"{file}:{first}: two columns have the same name: {', '.join(header)}")
    for number, row in rows:
        joined = "".join(row)
        if "\x00" in joined:
            bad.add(file, number, "a NUL character", joined)
        elif not _is_utf_8(joined):
            bad.add(file, number, _NOT_UTF_8, joined)
        else:
            yield number, dict(zip(header, row, strict=True))


def _tsv(file: Path, stream: io.BufferedReader, bad: InvalidRecords) -> Iterator[tuple[int, Any]]:
    return _csv(file, stream, bad, "\t")


def _is_utf_8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _rows(
    file: Path, stream: io.BufferedReader, bad: InvalidRecords, delimiter: str
) -> Iterator[tuple[int, list[str]]]:
    """(first line, fields) of each row, as many as in the first; blank ones are left out.

    Bytes that are not UTF-8 are left as surrogates. A quote too many makes one row of all lines up
    to the next quote. There, or after a bounded number of characters, it is noticed, and only the
    row's first line is put aside.
    """
    csv.field_size_limit(_MAX_LINE)
    lines = _raw_lines(stream)
    again: deque[tuple[int, str]] = deque()
    used: list[tuple[int, str]] = []
    width = 0

    def take() -> Iterator[str]:
        size = 0
        while True:
            if again:
                number, line = again.popleft()
            else:
                number, raw = next(lines, (0, b""))
                line = raw.decode("utf-8", "surrogateescape").removeprefix(_BOM)
                if not raw:
                    return
            size = size + len(line) if used else len(line)
            used.append((number, line))
            if size > _MAX_ROW and len(used) > 1:
                raise csv.Error("a quote that does not end")
            if len(line) > _MAX_LINE:
                raise csv.Error(f"a line of more than {_MAX_LINE >> 20} MB")
            yield line

    while True:
        try:
            for row in csv.reader(take(), delimiter=delimiter, strict=True):
                width = width or len(row)
                if row and len(row) != width:
                    raise csv.Error(f"{len(row)} fields where the header has {width}")
                number = used[0][0]
                used.clear()
                if row:
                    yield number, row
            return
        except csv.Error as error:
            number, line = used[0]
            bad.add(file, number, f"not CSV: {error}", line)
            again.extendleft(reversed(used[1:]))
            used.clear()


def _plain_text(
    file: Path, stream: io.BufferedReader, bad: InvalidRecords
) -> Iterator[tuple[int, Any]]:
    """Running text as documents of bounded size, cut at blank lines where there are any."""
    pieces: list[str] = []
    size, start, number = 0, 1, 1
    for line, text in _text_pieces(file, stream, bad):
        pieces.append(text)
        size, number = size + len(text), line
        if size >= _MAX_DOCUMENT or (text.isspace() and size >= _MAX_DOCUMENT // 2):
            bad.good += number - start  # one more counts as the record
            yield start, {"text": "".join(pieces)}
            pieces, size, start = [], 0, number + 1
    if "".join(pieces).strip():
        bad.good += number - start
        yield start, {"text": "".join(pieces)}


def _text_pieces(
    file: Path, stream: io.BufferedReader, bad: InvalidRecords
) -> Iterator[tuple[int, str]]:
    """(number, text) of each line; a long one comes in pieces."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    number = 1
    while piece := stream.readline(_MAX_DOCUMENT):
        ends = piece.endswith(b"\n")
        try:
            text = decoder.decode(piece, final=ends or not stream.peek(1))
            if "\x00" in text:
                bad.add(file, number, "a NUL character", piece)
            else:
                yield number, text.replace("\r\n", "\n")
        except UnicodeDecodeError:
            bad.add(file, number, _NOT_UTF_8, piece)
            decoder = codecs.getincrementaldecoder("utf-8")()
        number += ends


def _parquet(
    file: Path, source: IO[bytes], bad: InvalidRecords, counted: _Counted
) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    size = file.stat().st_size
    number = 0
    try:
        # Without the two settings a whole row group is held, which may be all of the file.
        table = pyarrow.parquet.ParquetFile(source, pre_buffer=False, buffer_size=READ_AHEAD)
        for batch in table.iter_batches(batch_size=256):
            for index in range(batch.num_rows):
                number += 1
                counted.report(size * number // table.metadata.num_rows)
                try:
                    [row] = batch.slice(index, 1).to_pylist()
                    check_characters(row)
                except UnicodeDecodeError:
                    bad.add(file, number, _NOT_UTF_8)
                except (ValueError, OverflowError) as error:  # the latter of dates far off
                    bad.add(file, number, str(error))
                else:
                    yield number, row
    except pyarrow.ArrowException as error:
        raise DataError(
            f"{file}: cannot be read as Parquet ({_line(error)}); get it again"
        ) from error
