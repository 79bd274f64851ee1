"""Compressed input: check the magic bytes, decompress as a stream, report bytes read.

A zip archive must contain one file.
"""

import bz2
import gzip
import io
import lzma
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import zstandard

from minimind.data.input_files import COMPRESSIONS
from minimind.data.locations import Location
from minimind.errors import DataError

Progress = Callable[[int], None]  # called with the number of bytes read since the last call

_MAGIC = {
    "gzip": re.compile(rb"\x1f\x8b"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
    "xz": re.compile(rb"\xfd7zXZ\0"),
    "bzip2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
    "zip": re.compile(rb"PK\x03\x04"),
}
# Errors of reading a damaged or truncated file; NotImplementedError: an unknown method of a zip.
DAMAGED = (
    *(OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError),
    *(zipfile.BadZipFile, NotImplementedError),
)
_BUFFER_BYTES = 1 << 20
# Smaller for compressed files, so that reported progress is not far ahead of the records.
_COMPRESSED_BUFFER_BYTES = 1 << 16
_ZSTD_CHUNK_BYTES = 1 << 12  # may decompress to 30,000 times as many


@contextmanager
def as_data_errors(file: Location) -> Iterator[None]:
    """Convert errors of reading `file` inside the `with` block to DataError."""
    try:
        yield
    except PermissionError as error:
        raise DataError(f"{file}: no permission to read it") from error
    except DAMAGED as error:
        compression = COMPRESSIONS.get(file.suffix.lower())
        what = f"cannot be decompressed as {compression}" if compression else "cannot be read"
        raise DataError(
            f"{file}: {what} ({one_line(error)}); the file is damaged or truncated, "
            "download it again"
        ) from error


def one_line(error: BaseException) -> str:
    """Return the message of an error without line breaks."""
    return " ".join(str(error).split())


class CountedFile(io.RawIOBase):
    """A binary file that reports how many of its bytes have been read."""

    def __init__(self, raw: IO[bytes], progress: Progress) -> None:
        self._raw, self._progress, self._reported = raw, progress, 0
        self.paused = False  # True while bytes are read out of order

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._raw.readinto(buffer)  # type: ignore[attr-defined]
        if not self.paused:
            self.report(self._raw.tell())
        return int(count)

    def seekable(self) -> bool:
        return self._raw.seekable()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._raw.seek(offset, whence)

    def report(self, position: int) -> None:
        """Report that the file has been read up to the byte `position`."""
        if position > self._reported:
            self._progress(position - self._reported)
            self._reported = position


def open_decompressed(file: Location, counted: CountedFile) -> io.BufferedReader:
    """Return a buffered stream of the decompressed bytes of `file`.

    Raises DataError for an empty file, and when the magic bytes contradict the file name.
    """
    compression = COMPRESSIONS.get(file.suffix.lower())
    buffer_bytes = _BUFFER_BYTES if compression is None else _COMPRESSED_BUFFER_BYTES
    stream: io.BufferedReader = io.BufferedReader(counted, buffer_bytes)
    _check_magic(file, compression, stream)
    if compression is None:
        return stream
    if compression == "zstd":
        return open_zstd(stream)
    if compression == "zip":
        counted.paused = True
        decompressed: Any = _open_zip(file, stream)
        counted.paused = False
    else:
        openers: dict[str, Any] = {"gzip": gzip.open, "xz": lzma.open, "bzip2": bz2.open}
        decompressed = openers[compression](stream)
    return io.BufferedReader(decompressed, _BUFFER_BYTES)


def _check_magic(file: Location, expected: str | None, stream: io.BufferedReader) -> None:
    head = stream.peek(_BUFFER_BYTES)
    if not head:
        raise DataError(f"{file}: the file is empty; leave it out, or download it again")
    actual = next((name for name, magic in _MAGIC.items() if magic.match(head)), None)
    if actual == expected:
        return
    if actual is None:
        raise DataError(
            f"{file}: the name ends in {file.suffix}, but the content is not {expected}; "
            "it is uncompressed or damaged"
        )
    [ending] = (ending for ending, name in COMPRESSIONS.items() if name == actual)
    raise DataError(
        f"{file}: the content is {actual}, but the name ends in {file.suffix}; "
        f"rename it so that it ends in {ending}"
    )


def _open_zip(file: Location, stream: IO[bytes]) -> IO[bytes]:
    """Open the only file of a zip archive. Raises DataError if it has several or is encrypted."""
    archive = zipfile.ZipFile(stream)
    members = [
        member
        for member in archive.infolist()
        if not member.is_dir() and not member.filename.startswith("__MACOSX/")
    ]
    if len(members) != 1 or members[0].flag_bits & 1:
        problem = "is encrypted" if len(members) == 1 else f"has {len(members):,} files, not one"
        raise DataError(f"{file}: the archive {problem}; unpack it")
    return archive.open(members[0])


def open_zstd(compressed: IO[bytes]) -> io.BufferedReader:
    """Return the decompressed bytes as a stream. Reading raises EOFError if it is truncated."""
    return io.BufferedReader(_ChunkStream(_decompress_zstd(compressed)), _BUFFER_BYTES)


def _decompress_zstd(compressed: IO[bytes]) -> Iterator[bytes]:
    """Yield the content of all frames of a zstd stream. Raises EOFError if it is truncated."""
    # zstandard's own stream reader does not report a truncated last frame.
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 27)
    frame = decompressor.decompressobj()
    while chunk := compressed.read(_ZSTD_CHUNK_BYTES):
        while chunk:
            if frame.eof:
                frame = decompressor.decompressobj()
            yield frame.decompress(chunk)
            chunk = frame.unused_data
    if not frame.eof:
        raise EOFError("the stream ends before its end marker")


class _ChunkStream(io.RawIOBase):
    """File object that reads from an iterator of byte chunks."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count
