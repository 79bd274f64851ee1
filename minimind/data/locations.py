"""Locations: paths of this machine, and URLs that fsspec opens, such as s3://bucket/folder.

A `UrlPath` has the methods of `pathlib.Path` that data preparation needs, with the same meaning. It
is a plain value, so it can be sent to other processes and machines.

Files are written to a temporary file of this machine. A local file is then renamed; a URL gets an
upload. Object stores show an upload only when it is complete, so no reader sees a part of a file.
"""

import contextlib
import fnmatch
import glob
import io
import re
import shutil
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from minimind import files
from minimind.errors import MinimindError, ResourceError, UsageError
from minimind.files import atomic_file

_URL = re.compile(r"[a-z][a-z0-9+.-]+://")
_BLOCK_BYTES = 8 << 20  # bytes read ahead from a URL
# These have no folders: an object's name only looks like a path.
_OBJECT_STORES = {*("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "obs", "oci"), "memory"}
# Names that drivers give to what changes with the content of a file; the first one counts.
_VERSIONS = (
    "ETag",
    "etag",
    "md5Hash",
    "mtime",
    "LastModified",
    "last_modified",
    "modify",
    "created",
)


class UrlStatus(NamedTuple):
    """Size in bytes, and a text that differs after a change of the file, if there is one."""

    st_size: int
    version: str | None


@dataclass(frozen=True)
class UrlPath:
    """A file or folder of an object store or server.

    Raises UsageError if the protocol is unknown or its driver is not installed, and ResourceError
    if the server refuses or cannot be reached. A missing file raises FileNotFoundError.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def __reduce__(self) -> tuple[Any, ...]:
        return UrlPath, (self.url,)  # without the opened file system

    def __truediv__(self, name: str) -> "UrlPath":
        return UrlPath(f"{self.url}/{name}")

    @property
    def _pure(self) -> PurePosixPath:
        return PurePosixPath(self.url)

    @property
    def name(self) -> str:
        return self._pure.name

    @property
    def stem(self) -> str:
        return self._pure.stem

    @property
    def suffix(self) -> str:
        return self._pure.suffix

    @property
    def suffixes(self) -> list[str]:
        return self._pure.suffixes

    @cached_property
    def _opened(self) -> tuple[Any, str, str]:
        """Return the file system, the path in it, and what precedes that path in the URL."""
        from fsspec.core import url_to_fs

        try:
            with self._errors():
                system, path = url_to_fs(self.url)
        except ImportError as error:  # its message names the package
            raise UsageError(f"{self.url}: {error}; it opens such URLs") from error
        except ValueError as error:
            raise UsageError(f"{self.url}: {error}; examples are s3://, gs:// and az://") from error
        return system, path, self.url.removesuffix(path)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn the exceptions of a driver, of which each has its own, into ResourceError."""
        try:
            yield
        except (MinimindError, FileNotFoundError, ImportError, ValueError):
            raise
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ResourceError(
                f"{self.url}: cannot be accessed ({reason}). Check the address, the credentials "
                "and the connection, and run the same command again: finished work is kept"
            ) from error

    def resolve(self) -> "UrlPath":
        """Return the URL itself: it is absolute."""
        return self

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """Open the file for reading."""
        system, path, _ = self._opened
        with self._errors():
            raw = system.open(path, mode, block_size=_BLOCK_BYTES)
        return io.BufferedReader(_UrlStream(self, raw))

    def read_bytes(self, start: int | None = None, end: int | None = None) -> bytes:
        """Return the content, or the bytes from `start` to `end`."""
        system, path, _ = self._opened
        with self._errors():
            content: bytes = system.cat_file(path, start=start, end=end)
        return content

    def read_text(self, encoding: str) -> str:
        return self.read_bytes().decode(encoding)

    def stat(self) -> UrlStatus:
        system, path, _ = self._opened
        with self._errors():
            system.invalidate_cache()
            info = system.info(path)
        version = next((str(info[key]) for key in _VERSIONS if info.get(key)), None)
        return UrlStatus(int(info["size"] or 0), version)

    def exists(self) -> bool:
        system, path, _ = self._opened
        with self._errors():
            system.invalidate_cache()
            return bool(system.exists(path))

    def is_file(self) -> bool:
        system, path, _ = self._opened
        with self._errors():
            system.invalidate_cache()
            return bool(system.isfile(path))

    def iterdir(self) -> Iterator["UrlPath"]:
        """Yield the files and folders of a folder; none if it is missing."""
        return self.glob("*")

    def glob(self, pattern: str) -> Iterator["UrlPath"]:
        """Yield the files and folders of a folder whose names match; none if it is missing."""
        system, path, prefix = self._opened
        try:
            with self._errors():
                system.invalidate_cache()
                names = system.ls(path, detail=False)
        except FileNotFoundError:
            return
        for name in names:
            child = UrlPath(prefix + name.rstrip("/"))
            if child != self and fnmatch.fnmatchcase(child.name, pattern):
                yield child

    def matches(self) -> Iterator["UrlPath"]:
        """Yield the files and folders that the URL stands for as a pattern, such as s3://b/*.gz."""
        system, path, prefix = self._opened
        with self._errors():
            system.invalidate_cache()
            found = system.glob(path)
        return (UrlPath(prefix + name) for name in found)

    def walk_files(self) -> Iterator["UrlPath"]:
        """Yield all files below the folder, except for hidden ones."""
        system, path, prefix = self._opened
        with self._errors():
            system.invalidate_cache()
            found = system.find(path)
        below = ((name, PurePosixPath(name).relative_to(path).parts) for name in found)
        return (
            UrlPath(prefix + name)
            for name, parts in below
            if not any(part.startswith(".") for part in parts)
        )

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        """Create the folder and its parents, where the protocol has folders."""
        system, path, _ = self._opened
        if self.url.partition("://")[0] not in _OBJECT_STORES:
            with self._errors():
                system.makedirs(path, exist_ok=exist_ok)

    def put(self, source: Path) -> None:
        """Upload a file of this machine."""
        system, path, _ = self._opened
        UrlPath(self.url.rpartition("/")[0]).mkdir()
        try:
            with self._errors():
                system.put_file(str(source), path)
        except (FileNotFoundError, ValueError) as error:
            raise ResourceError(
                f"{self.url}: cannot be written ({error}); check that the bucket exists"
            ) from error


class _UrlStream(io.RawIOBase):
    """A file of a driver, with the errors of `UrlPath`."""

    def __init__(self, location: UrlPath, raw: Any) -> None:
        self._location, self._raw = location, raw

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._raw.seekable())

    def readinto(self, buffer: Any) -> int:
        with self._location._errors():
            content = self._raw.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with self._location._errors():
            return int(self._raw.seek(offset, whence))

    def tell(self) -> int:
        return int(self._raw.tell())

    def close(self) -> None:
        self._raw.close()
        super().close()


Location = Path | UrlPath


def is_url(text: str) -> bool:
    """Return True for s3://bucket/file and the like, False for paths and dataset names."""
    return _URL.match(text) is not None


def location(text: str) -> Location:
    """Return the location that a path or URL names; file:// names a path."""
    if text.startswith("file://"):
        return Path(urllib.request.url2pathname(urllib.parse.urlsplit(text).path))
    return UrlPath(text.rstrip("/")) if is_url(text) else Path(text)


def list_urls(url: str) -> list[UrlPath]:
    """Return the files that a URL stands for: one, all below a folder, or those of a pattern.

    They are in the order in which the same files of this machine are listed.
    """
    root = UrlPath(url.rstrip("/"))
    if glob.has_magic(url):
        found = [match for match in root.matches() if match.is_file()]
    else:
        found = [root] if root.is_file() else list(root.walk_files())
    return sorted(found, key=lambda each: PurePosixPath(each.url).parts)


def is_below(file: Location, folder: Location) -> bool:
    """Return True if a file is in a folder or below it, also if links lead there."""
    file, folder = file.resolve(), folder.resolve()
    if isinstance(file, Path) and isinstance(folder, Path):
        return folder in file.parents
    return str(file).startswith(f"{folder}/")


@contextlib.contextmanager
def new_file(target: Location) -> Iterator[Path]:
    """Yield an empty temporary file; at the end of the `with` block it replaces `target`."""
    if isinstance(target, Path):
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(target) as temporary:
            yield temporary
        return
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder, target.name)
        temporary.touch()
        yield temporary
        target.put(temporary)


@contextlib.contextmanager
def new_files(target: Location) -> Iterator[Path]:
    """Yield a folder for new files of the folder `target`; it is `target` itself if that is local.

    The files in the folder are uploaded at the end of the `with` block.
    """
    if isinstance(target, Path):
        target.mkdir(parents=True, exist_ok=True)
        yield target
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        yield folder
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            (target / file.relative_to(folder).as_posix()).put(file)


def remove(locations: Iterable[Location]) -> None:
    """Remove files, those of one URL's file system in one request where it can."""
    urls: list[UrlPath] = []
    for each in locations:
        if isinstance(each, Path):
            each.unlink(missing_ok=True)
        else:
            urls.append(each)
    if urls:
        system = urls[0]._opened[0]
        with urls[0]._errors():
            system.rm([url._opened[1] for url in urls])


def remove_folder(folder: Location) -> None:
    """Remove a folder and everything below it."""
    if isinstance(folder, Path):
        shutil.rmtree(folder)
        return
    system, path, _ = folder._opened
    with folder._errors():
        system.rm(path, recursive=True)


def write_json(target: Location, content: Any) -> None:
    """Write a JSON file atomically."""
    if isinstance(target, Path):
        files.write_json(target, content)
        return
    with new_file(target) as temporary:
        files.write_json(temporary, content)
