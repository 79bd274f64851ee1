"""Downloads that resume and are verified.

    data/skypile/2020-40_zh_head_0000.jsonl                 the file, complete and verified
                 2020-40_zh_head_0000.jsonl.origin          where it comes from, and its SHA-256
                 2020-40_zh_head_0000.jsonl.e4fbc97c.part   an unfinished download

A connection that breaks, stalls or is refused by a busy server is continued at the byte where it
stopped, also by a later call. The SHA-256 of the whole file is compared with that of the registry
or of the hub, because a damaged file can have the right size. The name of an unfinished file
contains the beginning of the expected hash, so the parts of two versions are never joined. A file
for which no hash is known is continued only within a call.
"""

import hashlib
import http.client
import os
import shutil
import time
import urllib.parse
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

from minimind.data.hub import (
    HUB_NAMES,
    Hub,
    HubError,
    HubFile,
    Listing,
    Repository,
    TransientError,
    list_repository,
    open_file,
)
from minimind.data.registry import FOLDER_VARIABLE, Published, data_folder, similar
from minimind.data.stamps import settled_stamp_of, sha256_of, stamp_of
from minimind.errors import DataError, ResourceError, shell_words
from minimind.files import fsync, read_json_object, write_json
from minimind.units import format_size

_MAX_FAILURES = 5  # in a row, without a byte in between
_MAX_FAILURES_OF_LISTING = 3
_MAX_FAILURES_ELSEWHERE = 2  # of a host that the hub redirects to
_BACKOFF_S = 0.5  # doubled after each failure
_MAX_WAIT_S = 60.0
_CHUNK_BYTES = 1 << 20
_SPARE_BYTES = 64 << 20  # that stay free on the disk
ORIGIN_SUFFIX = ".origin"

Progress = Callable[[int, int | None], None]  # bytes so far, bytes in total
Say = Callable[[str], None]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Located:
    """A published file on a hub: its repository at a commit, its size and its hash."""

    published: Published
    repository: Repository
    file: HubFile


# --- Published datasets


def locate(published: Published, folder: Path, hub: Hub | None, say: Say) -> Located:
    """Find a file on `hub`, or on the preferred hub that has it.

    folder: the data folder, for messages. Raises DataError if no hub has it, and UsageError if the
    set is not published on `hub`.
    """
    failures: list[str] = []
    for repository in published.repositories(hub):
        if failures:
            say(f"{failures[-1]}; trying {HUB_NAMES[repository.hub]}")
        try:
            listing = list_files_of(repository, say)
            return Located(published, listing.repository, _listed_file(published, listing))
        except HubError as error:
            failures.append(str(error))
        except TransientError as error:
            failures.append(f"{error.host} cannot be reached ({error}){mirror_hint(repository)}")
    hint = _manual_download_hint(published, folder)
    raise DataError(f"{published.name}: {'; '.join(failures)}. {hint}")


def fetch(located: Located, folder: Path, *, progress: Progress, say: Say) -> Path:
    """Download a located file into a data folder and record its origin; return its path.

    Raises DataError if the hub does not deliver it, and ResourceError if the disk is too small.
    """
    published = located.published
    target = published.path_in(folder)
    try:
        download_file(located.repository, located.file, target, progress=progress, say=say)
    except TransientError as error:
        raise DataError(_explain(located, folder, error)) from error
    except HubError as error:
        advice = f"{_other_copy_hint(located, folder)}{_manual_download_hint(published, folder)}"
        raise DataError(f"{published.name}: {error}. {advice}") from error
    except ResourceError as error:
        raise ResourceError(f"{error}: {FOLDER_VARIABLE} names the folder") from error
    origin = {
        "name": published.name,
        "licence": published.licence,
        "hub": located.repository.hub,
        "repository": located.repository.id,
        "revision": located.repository.branch,
        "path": located.file.path,
    }
    record_origin(target, origin)
    return target


def is_present(published: Published, target: Path) -> bool:
    """Return True if a file is downloaded and intact, or was put there by the user.

    Raises DataError if it has another SHA-256 than the published file.
    """
    if not target.is_file():
        return False
    origin = origin_of(target) or {}
    if origin.get("stamp") == stamp_of(target):
        return True
    expected = origin.get("sha256") or published.file.sha256
    if expected is None:
        return True
    actual = sha256_of(target)
    if actual != expected:
        raise DataError(
            f"{target} is not the published file {published.name}: its SHA-256 is {actual}, not "
            f"{expected}. To use it anyway, give its path; to download it again, remove it"
        )
    if origin:
        write_json(_origin_path(target), origin | {"stamp": settled_stamp_of(target)})
    return True


def is_available(published: Published, target: Path) -> bool:
    """Return True if a file was downloaded, or put there and verified now or earlier.

    Unlike `is_present`, it does not notice later changes. Raises DataError as `is_present`.
    """
    if target.is_file() and origin_of(target) is not None:
        return True
    if not is_present(published, target):
        return False
    if published.file.sha256:
        with suppress(OSError):  # a read-only folder is verified each time
            record_origin(target, {"name": published.name})
    return True


def origin_of(file: Path) -> dict[str, Any] | None:
    """Return where a downloaded file comes from; None for a file of another kind."""
    try:
        return read_json_object(_origin_path(file))
    except (OSError, ValueError):
        return None


def _origin_path(file: Path) -> Path:
    return file.with_name(file.name + ORIGIN_SUFFIX)


def record_origin(target: Path, origin: Mapping[str, Any]) -> None:
    """Write where a file comes from beside it, with its size, SHA-256 and stamp."""
    verified = {
        "bytes": target.stat().st_size,
        "sha256": sha256_of(target),
        "stamp": settled_stamp_of(target),
    }
    write_json(_origin_path(target), dict(origin) | verified)


def _listed_file(published: Published, listing: Listing) -> HubFile:
    """Return the file with the SHA-256 of the registry. Raises HubError if it is another file."""
    path, known = published.file.path, published.file.sha256
    where = f"{listing.repository.host} at {listing.repository.branch[:12]}"
    file = listing.files.get(path)
    if file is None:
        raise HubError(f"{where} has no file {path}{similar(path, listing.files)}", 404)
    if known and file.sha256 and file.sha256 != known:
        raise HubError(
            f"{where} has another version of {path}: SHA-256 {file.sha256} instead of {known}"
        )
    return replace(file, sha256=file.sha256 or known)


def _manual_download_hint(published: Published, folder: Path) -> str:
    url = published.repositories()[-1].file_url(published.file.path)
    target = published.path_in(folder)
    return f"It can also be downloaded by other means from {url}, and saved as {target}"


def _other_copy_hint(located: Located, folder: Path) -> str:
    """Return a sentence with the command that downloads from another hub; "" if there is none."""
    published = located.published
    others = [r.hub for r in published.repositories() if r.hub != located.repository.hub]
    if not others:
        return ""
    own_folder = () if folder == data_folder() else ("--dir", folder)
    command = shell_words("data", "get", published.name, "--hub", others[0], *own_folder)
    return f"{HUB_NAMES[others[0]]} has a copy: minimind {command} downloads it. "


def _explain(located: Located, folder: Path, error: TransientError) -> str:
    """Describe a failed download and what helps."""
    published, repository = located.published, located.repository
    if error.host != repository.host:
        text = f"{repository.host} redirects to {error.host}, which cannot be reached ({error})"
        remedy = "HTTPS_PROXY names a proxy"
        if repository.hub == "hf":
            text += ". Mirrors of huggingface.co often serve only the listings themselves"
            remedy = "Set HF_ENDPOINT to another mirror, or HTTPS_PROXY to a proxy"
    else:
        text = f"the connection to {error.host} failed repeatedly ({error})"
        remedy = "What is downloaded so far is kept; the same command continues"
    return (
        f"{published.name}: {text}. {_other_copy_hint(located, folder)}{remedy}. "
        f"{_manual_download_hint(published, folder)}"
    )


# --- Any file of a repository


def list_files_of(repository: Repository, say: Say) -> Listing:
    """Return the files of a repository, after several attempts. Raises as `list_repository`."""
    return _with_retries(
        lambda: list_repository(repository), lambda: 0, _MAX_FAILURES_OF_LISTING, say
    )


def mirror_hint(repository: Repository) -> str:
    """Return what helps if huggingface.co cannot be reached; "" for another server."""
    if repository.host != "huggingface.co":
        return ""
    return "; HF_ENDPOINT names a mirror, HTTPS_PROXY a proxy"


def download_file(
    repository: Repository, file: HubFile, target: Path, *, progress: Progress, say: Say
) -> None:
    """Download a file and verify it; `target` appears only when it is complete.

    A `target` that is another version of the file is replaced. Raises HubError if the hub refuses
    or delivers a wrong file twice, TransientError if the connection fails repeatedly, ResourceError
    if the disk is too small.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(target, file)
    has_hash = bool(file.sha256 or file.blob_id)
    with FileLock(target.with_name(f".{target.name}.lock")):
        if target.is_file():  # from an interrupted call, or another process
            if has_hash and _difference(target, file) is None:
                return
            say(f"{target.name} in {target.parent} is of another version; downloading it again")
            target.unlink()
        if not has_hash:
            part.unlink(missing_ok=True)
        _check_disk(part, file)
        for attempt in (1, 2):
            _transfer(repository, file, part, progress, say)
            difference = _difference(part, file)
            if difference is None:
                break
            part.unlink()
            if attempt == 2:
                raise HubError(
                    f"{file.path}: {repository.host} delivered a damaged file twice "
                    f"({difference}); nothing was kept. Try again later"
                )
            say(f"{file.path} is damaged ({difference}); downloading it again")
        fsync(part)
        os.replace(part, target)


def part_of(target: Path, file: HubFile) -> Path:
    """Return the unfinished download of a file."""
    digest = (file.sha256 or file.blob_id or "unknown")[:8]
    return target.with_name(f"{target.name}.{digest}.part")


def _check_disk(part: Path, file: HubFile) -> None:
    needed = (file.size or 0) - _size(part) + _SPARE_BYTES
    free = shutil.disk_usage(part.parent).free
    if needed > free:
        raise ResourceError(
            f"{part.parent}: the download needs {format_size(needed)}, and {format_size(free)} "
            "are free. Free some space, or choose a folder on another disk"
        )


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _transfer(
    repository: Repository, file: HubFile, part: Path, progress: Progress, say: Say
) -> None:
    """Append to `part` until it is complete; continue after broken connections."""
    if file.size is not None and _size(part) > file.size:
        part.unlink()

    def step() -> bool:
        _append(repository, file, part, progress)
        return True

    if _size(part):
        say(f"continuing {file.path} at {_size(part) / 1e6:,.1f} MB")
    if file.size is None or _size(part) < file.size:
        _with_retries(step, lambda: _size(part), _MAX_FAILURES, say, repository.host)
    elif file.size == 0:
        part.touch()


def _with_retries(
    request: Callable[[], _T],
    position: Callable[[], int],
    max_failures: int,
    say: Say,
    host: str = "",
) -> _T:
    """Return the result of `request`; repeat it after a TransientError, with growing pauses.

    position: a number that grows when a failed attempt has made progress. host: that of the hub;
    another one, to which the hub redirects, is tried less often.
    """
    failures = 0
    while True:
        before = position()
        try:
            return request()
        except TransientError as error:
            failures = 1 if position() > before else failures + 1
            elsewhere = host and error.host != host
            if failures >= (_MAX_FAILURES_ELSEWHERE if elsewhere else max_failures):
                raise
            wait = max(_BACKOFF_S * 2 ** (failures - 1), error.retry_after)
            wait = min(wait, _MAX_WAIT_S)
            say(f"{error.host}: {error}; trying again in {wait:.0f} s")
            time.sleep(wait)


def _append(repository: Repository, file: HubFile, part: Path, progress: Progress) -> None:
    """Request the rest of a file and append it. Raises TransientError if it is incomplete."""
    done = _size(part)
    try:
        response = open_file(repository, file.path, done)
    except HubError as error:
        if error.status != 416:  # a range that does not exist: the part is not of this file
            raise
        part.unlink()
        raise TransientError(str(error), repository.host) from error
    host = urllib.parse.urlsplit(response.url).netloc
    with response:
        resumed = response.status == 206
        if resumed and not (response.headers["Content-Range"] or "").startswith(f"bytes {done}-"):
            part.unlink()
            raise TransientError("it sent another range than requested", host)
        done = done if resumed else 0
        _check_length(response, file, done)
        with part.open("ab" if resumed else "wb") as stream:
            progress(done, file.size)
            while chunk := _read(response, host):
                stream.write(chunk)
                stream.flush()
                done += len(chunk)
                progress(done, file.size)
    if file.size is not None and done < file.size:
        raise TransientError(
            f"the connection was closed after {done:,} of {file.size:,} bytes", host
        )


def _check_length(response: http.client.HTTPResponse, file: HubFile, done: int) -> None:
    """Raise HubError if the answer is not as long as the listed file, such as an error page."""
    length = response.headers["Content-Length"]
    if length and file.size is not None and int(length) + done != file.size:
        raise HubError(
            f"{file.path} has {int(length) + done:,} bytes at {response.url}, but is listed with "
            f"{file.size:,} bytes"
        )


def _read(response: http.client.HTTPResponse, host: str) -> bytes:
    try:
        return response.read1(_CHUNK_BYTES)  # what has arrived, so that progress is steady
    except (OSError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TransientError(reason, host) from error


def _difference(part: Path, file: HubFile) -> str | None:
    """Return how a complete download differs from the listed file; None if it is the same."""
    if file.size is not None and _size(part) != file.size:
        return f"{_size(part):,} bytes instead of {file.size:,}"
    if file.sha256:
        actual = sha256_of(part)
        return None if actual == file.sha256 else f"SHA-256 {actual} instead of {file.sha256}"
    if file.blob_id:
        content = part.read_bytes()  # small: large files have a SHA-256
        actual = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return None if actual == file.blob_id else f"git blob {actual} instead of {file.blob_id}"
    return None
