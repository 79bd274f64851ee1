"""File formats: JSON Lines, JSON, CSV and TSV, plain text, Parquet.

Every reader yields (line, value) for each record: the number of its first line (for Parquet: of its
row), and the parsed value, not yet converted to a `Record`. Invalid records are counted in an
`InvalidRecords`. Only the current record is held in memory (for Parquet a part of a row group).
"""

import codecs
import contextlib
import csv
import io
import json
import re
from collections import deque
from collections.abc import Iterator
from itertools import chain
from typing import IO, Any

from minimind.data.compression import (
    CountedFile,
    Progress,
    as_data_errors,
    one_line,
    open_decompressed,
)
from minimind.data.input_files import COMPRESSIONS, SUPPORTED, format_of
from minimind.data.invalid import CONVERT_TO_UTF_8, NOT_UTF_8, InvalidRecords
from minimind.data.locations import Location
from minimind.data.strict_json import check_characters, parse_json
from minimind.errors import DataError

_CHUNK_BYTES = 1 << 20
_MAX_LINE = 16 << 20  # bytes; a longer line is an invalid record
_MAX_ROW = 1 << 20  # characters of a CSV row of several lines; more means an unclosed quote
_MAX_DOCUMENT = 1 << 16  # characters of plain text per record
_MAX_COMPRESSED_PARQUET = 256 << 20  # bytes, decompressed: Parquet needs random access
_PARQUET_ROWS = 256
_BOM = "\ufeff"

Values = Iterator[tuple[int, Any]]


def read_values(file: Location, invalid: InvalidRecords, progress: Progress) -> Values:
    """Yield (line, value) for each record of a file of any supported format.

    Raises DataError for a file that cannot be read at all.
    """
    kind = format_of(file)
    if kind is None:
        raise DataError(f"{file}: unsupported file format; {SUPPORTED}")
    readers = {".json": _json, ".csv": _csv, ".tsv": _tsv, ".txt": _plain_text}
    with as_data_errors(file), file.open("rb") as raw:
        counted = CountedFile(raw, progress)
        stream = open_decompressed(file, counted)
        if kind == ".parquet":
            source = raw if file.suffix.lower() not in COMPRESSIONS else _in_memory(file, stream)
            yield from _parquet(file, source, invalid, counted)
        else:
            _check_text(file, stream)
            yield from readers.get(kind, _json_lines)(file, stream, invalid)
        counted.report(file.stat().st_size)


def _check_text(file: Location, stream: io.BufferedReader) -> None:
    """Raise DataError for content that is not UTF-8 text, judged by its first bytes."""
    head = stream.peek(_CHUNK_BYTES)[:4096]
    if not head:
        raise DataError(f"{file}: the file is empty; leave it out, or download it again")
    if head.startswith(b"PAR1"):
        raise DataError(f"{file}: the content is Parquet; rename it so that it ends in .parquet")
    # UTF-16 without a byte order mark: every ASCII character has a zero byte.
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or head.count(0) * 8 > len(head):
        raise DataError(
            f"{file}: {NOT_UTF_8}: UTF-16, or not text; {CONVERT_TO_UTF_8.format('UTF-16')}"
        )


# --- JSON Lines


def _raw_lines(stream: IO[bytes], first: bytes = b"") -> Iterator[tuple[int, bytes]]:
    """Yield (number, line), split only at "\\n"; a line that is too long is truncated."""
    number = 0
    while line := first or stream.readline(_MAX_LINE + 1):
        first, number = b"", number + 1
        if len(line) > _MAX_LINE:
            rest = line
            while rest and not rest.endswith(b"\n"):
                rest = stream.readline(_CHUNK_BYTES)
        yield number, line


def _json_lines(
    file: Location, stream: io.BufferedReader, invalid: InvalidRecords, first: bytes = b""
) -> Values:
    """Read one value per line. `first`: the first line, if it was read before."""
    for number, line in _raw_lines(stream, first):
        if len(line) > _MAX_LINE:
            invalid.add(file, number, f"a line of more than {_MAX_LINE >> 20} MB", line)
            continue
        try:
            text = line.decode("utf-8").removeprefix(_BOM)
            if text and not text.isspace():
                yield number, parse_json(text)
        except UnicodeDecodeError:
            invalid.add(file, number, NOT_UTF_8, line)
        except ValueError as error:
            invalid.add(file, number, str(error), line)


# --- JSON


def _json(file: Location, stream: io.BufferedReader, invalid: InvalidRecords) -> Values:
    """Read an array of records, or concatenated records, often one per line."""
    first = stream.readline(_MAX_LINE + 1)
    if _is_object(first):
        yield from _json_lines(file, stream, invalid, first)
        return
    try:
        for line, text in _json_texts(file, stream, first):
            try:
                value = parse_json(text)
            except ValueError as error:
                invalid.add(file, line, str(error), text)
            else:
                yield line, value
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: {NOT_UTF_8} ({error.reason}); if it is GBK, "
            f"{CONVERT_TO_UTF_8.format('GB18030')}"
        ) from None


def _is_object(line: bytes) -> bool:
    with contextlib.suppress(ValueError):
        return isinstance(parse_json(line.decode("utf-8-sig")), dict)
    return False


def _json_texts(file: Location, stream: IO[bytes], first: bytes) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of each element of an array, or of each of several concatenated values.

    Raises DataError for invalid JSON: the beginning of the next element is then unknown.
    """
    decode = codecs.getincrementaldecoder("utf-8-sig")().decode
    chunks = chain([first], iter(lambda: stream.read(_CHUNK_BYTES), b""))
    # `parse_json` checks the numbers: here a long integer must not raise an error.
    find_end = json.JSONDecoder(parse_int=str).raw_decode
    text, position, line = "", 0, 1
    in_array = closed = False

    def read_more() -> bool:
        nonlocal text, position
        chunk = next(chunks, b"")
        text, position = text[position:] + decode(chunk, final=not chunk), 0
        return bool(chunk)

    separator = re.compile(r"[ \t\r\n]*")
    read_more()
    while True:
        end = separator.match(text, position).end()  # type: ignore[union-attr]
        line, position = line + text.count("\n", position, end), end
        if position == len(text):
            if read_more():
                continue
            break
        if closed:
            raise DataError(f"{file}: line {line}: unexpected content after the end of the array")
        if not in_array and text[position] == "[":
            in_array, position, separator = True, position + 1, re.compile(r"[ \t\r\n,]*")
        elif in_array and text[position] == "]":
            closed, position = True, position + 1
        else:
            try:
                end = find_end(text, position)[1]
                if end == len(text) and read_more():  # a number may continue in the next chunk
                    continue
            except (json.JSONDecodeError, RecursionError) as error:
                if len(text) - position <= _MAX_LINE and read_more():
                    continue
                reason = getattr(error, "msg", "nested too deeply")
                raise DataError(
                    f"{file}: line {line}: not JSON: {reason}, in the record that begins here. "
                    "Fix it, or convert the file to JSON Lines (.jsonl)"
                ) from None
            yield line, text[position:end]
            line, position = line + text.count("\n", position, end), end
    if in_array and not closed:
        raise DataError(f"{file}: the file is truncated: its array does not end; download it again")


# --- CSV and TSV


def _csv(
    file: Location, stream: io.BufferedReader, invalid: InvalidRecords, delimiter: str = ","
) -> Values:
    """Read rows as objects whose keys are the fields of the header."""
    rows = _csv_rows(file, stream, invalid, delimiter)
    before = invalid.total
    header_line, header = next(rows, (0, []))
    if invalid.total > before or not _is_utf_8("".join(header)):
        raise DataError(
            f"{file}: the header, which names the columns, is not CSV in UTF-8; "
            f"if it is GBK, {CONVERT_TO_UTF_8.format('GB18030')}"
        )
    if len(set(header)) < len(header):
        raise DataError(
            f"{file}:{header_line}: two columns have the same name: {', '.join(header)}"
        )
    for number, row in rows:
        joined = "".join(row)
        if "\x00" in joined:
            invalid.add(file, number, "a NUL character", joined)
        elif not _is_utf_8(joined):
            invalid.add(file, number, NOT_UTF_8, joined)
        else:
            yield number, dict(zip(header, row, strict=True))


def _tsv(file: Location, stream: io.BufferedReader, invalid: InvalidRecords) -> Values:
    return _csv(file, stream, invalid, "\t")


def _is_utf_8(text: str) -> bool:
    """Return False for text with surrogates, which stand for bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _csv_rows(
    file: Location, stream: io.BufferedReader, invalid: InvalidRecords, delimiter: str
) -> Iterator[tuple[int, list[str]]]:
    """Yield (first line, fields) of each row that has as many fields as the header.

    Blank rows are skipped. Bytes that are not UTF-8 become surrogates. An unclosed quote makes
    the parser read on to the next quote, or up to `_MAX_ROW` characters. Then only the first line
    of that row is invalid, and parsing resumes at the second.
    """
    csv.field_size_limit(_MAX_LINE)
    lines = _raw_lines(stream)
    pushed_back: deque[tuple[int, str]] = deque()
    row_lines: list[tuple[int, str]] = []  # of the current row
    width = 0

    def next_lines() -> Iterator[str]:
        size = 0
        while True:
            if pushed_back:
                number, line = pushed_back.popleft()
            else:
                number, raw = next(lines, (0, b""))
                line = raw.decode("utf-8", "surrogateescape").removeprefix(_BOM)
                if not raw:
                    return
            size = size + len(line) if row_lines else len(line)
            row_lines.append((number, line))
            if size > _MAX_ROW and len(row_lines) > 1:
                raise csv.Error("an unclosed quote")
            if len(line) > _MAX_LINE:
                raise csv.Error(f"a line of more than {_MAX_LINE >> 20} MB")
            yield line

    while True:
        try:
            for row in csv.reader(next_lines(), delimiter=delimiter, strict=True):
                width = width or len(row)
                if row and len(row) != width:
                    raise csv.Error(f"{len(row)} fields where the header has {width}")
                number = row_lines[0][0]
                row_lines.clear()
                if row:
                    yield number, row
            return
        except csv.Error as error:
            number, line = row_lines[0]
            invalid.add(file, number, f"not CSV: {error}", line)
            pushed_back.extendleft(reversed(row_lines[1:]))
            row_lines.clear()


# --- Plain text


def _plain_text(file: Location, stream: io.BufferedReader, invalid: InvalidRecords) -> Values:
    """Split running text into documents of bounded size, at blank lines where possible."""
    pieces: list[str] = []
    size, start, number = 0, 1, 1
    for line, text in _text_lines(file, stream, invalid):
        pieces.append(text)
        size, number = size + len(text), line
        if size >= _MAX_DOCUMENT or (text.isspace() and size >= _MAX_DOCUMENT // 2):
            invalid.num_valid += number - start  # lines; the record itself is counted later
            yield start, {"text": "".join(pieces)}
            pieces, size, start = [], 0, number + 1
    if "".join(pieces).strip():
        invalid.num_valid += number - start
        yield start, {"text": "".join(pieces)}


def _text_lines(
    file: Location, stream: io.BufferedReader, invalid: InvalidRecords
) -> Iterator[tuple[int, str]]:
    """Yield (number, text) of each line; a long line comes in several pieces."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    number = 1
    while piece := stream.readline(_MAX_DOCUMENT):
        ends_line = piece.endswith(b"\n")
        try:
            text = decoder.decode(piece, final=ends_line or not stream.peek(1))
            if "\x00" in text:
                invalid.add(file, number, "a NUL character", piece)
            else:
                yield number, text.replace("\r\n", "\n")
        except UnicodeDecodeError:
            invalid.add(file, number, NOT_UTF_8, piece)
            decoder = codecs.getincrementaldecoder("utf-8")()
        number += ends_line


# --- Parquet


def _in_memory(file: Location, stream: IO[bytes]) -> IO[bytes]:
    content = stream.read(_MAX_COMPRESSED_PARQUET + 1)
    if len(content) > _MAX_COMPRESSED_PARQUET:
        raise DataError(
            f"{file}: compressed Parquet of more than {_MAX_COMPRESSED_PARQUET >> 20} MB; "
            "decompress it first (Parquet files are compressed internally)"
        )
    return io.BytesIO(content)


def _parquet(
    file: Location, source: IO[bytes], invalid: InvalidRecords, counted: CountedFile
) -> Values:
    import pyarrow
    import pyarrow.parquet

    size = file.stat().st_size
    number = 0
    try:
        # By default pyarrow holds a row group in memory, which may be the complete file.
        table = pyarrow.parquet.ParquetFile(source, pre_buffer=False, buffer_size=_CHUNK_BYTES)
        for batch in table.iter_batches(batch_size=_PARQUET_ROWS):
            for index in range(batch.num_rows):
                number += 1
                counted.report(size * number // table.metadata.num_rows)
                try:
                    [row] = batch.slice(index, 1).to_pylist()
                    check_characters(row)
                except UnicodeDecodeError:
                    invalid.add(file, number, NOT_UTF_8)
                except (ValueError, OverflowError) as error:  # OverflowError: dates out of range
                    invalid.add(file, number, str(error))
                else:
                    yield number, row
    except pyarrow.ArrowException as error:
        raise DataError(
            f"{file}: cannot be read as Parquet ({one_line(error)}); download it again"
        ) from error
