"""Resumable, verified downloads from the Hugging Face hub and ModelScope, by plain HTTP.

Both hubs serve a file of a repository at one address, with byte ranges. A broken connection
continues where it stopped, also in a later call; the SHA-256 of the whole file is compared with
the registry's, or else with the hub's own. A file that fails is removed and fetched once more.
"""

import hashlib
import http.client
import json
import os
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minimind.data.registry import Published
from minimind.errors import DataError, ResourceError, UsageError

Hub = Literal["hf", "modelscope"]
HUBS: tuple[Hub, ...] = ("modelscope", "hf")  # in order of preference
HUB_VARIABLE = "MINIMIND_HUB"
_ENDPOINTS = {
    "hf": ("HF_ENDPOINT", "https://huggingface.co"),
    "modelscope": ("MODELSCOPE_ENDPOINT", "https://modelscope.cn"),
}
_TOKENS = {"hf": "HF_TOKEN", "modelscope": "MODELSCOPE_API_TOKEN"}
_STALL = 30.0  # seconds without a byte
_RETRIES = 5  # in a row without a byte gained
_CHUNK = 1 << 20
_SPARE = 200 << 20  # bytes of the disk that stay free
Progress = Callable[[int, int | None], None]  # bytes so far, bytes in all


@dataclass(frozen=True)
class Remote:
    """Where a hub has a file, and what it says of it."""

    hub: Hub
    url: str
    size: int | None
    sha256: str | None


class _Refused(Exception):
    """The hub answered, and another attempt would get the same answer."""


def choose_hubs(published: Published, asked: str | None) -> list[Hub]:
    """Return the hubs to try in order: the one asked for alone, or all that have the set.

    asked: "hf" or "modelscope"; None means $MINIMIND_HUB. Raises UsageError for another name, or
    where the set is not on that hub.
    """
    asked = asked or os.environ.get(HUB_VARIABLE)
    there = [hub for hub in HUBS if getattr(published.set, hub)]
    if not asked:
        return there
    if asked not in HUBS:
        raise UsageError(f"no hub {asked!r} is known; known are {', '.join(HUBS)}")
    if asked not in there:
        raise UsageError(f"{published.name} is not on {asked}; it is on {', '.join(there)}")
    return [hub for hub in there if hub == asked]


def locate(published: Published, hub: Hub) -> Remote:
    """Ask a hub for size and SHA-256 of a file. Raises DataError with what to do next."""
    url = _url(published, hub)
    try:
        with _open(urllib.request.Request(url, method="HEAD"), hub) as answer:
            headers = answer.headers
    except (OSError, _Refused, http.client.HTTPException) as error:
        raise DataError(_advice(published, hub, error)) from error
    size = headers.get("X-Linked-Size") or headers.get("Content-Length")
    etag = (headers.get("X-Linked-Etag") or "").strip('"')
    sha256 = etag if len(etag) == 64 else _modelscope_sha256(published, hub)
    return Remote(hub, url, int(size) if size else None, published.file.sha256 or sha256)


def download(
    published: Published,
    folder: Path,
    remote: Remote,
    progress: Progress = lambda done, total: None,
) -> Path:
    """Fetch a file into `folder` and return its path; one that is there whole is kept.

    Raises DataError when the hub does not give it or gives other bytes, ResourceError when the
    disk has no room.
    """
    path = folder / published.file_name
    if path.is_file() and remote.size in (None, path.stat().st_size):
        return path
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    _check_room(part, remote)
    for attempt in (1, 2):
        try:
            _fetch(remote, part, progress)
        except (OSError, _Refused, http.client.HTTPException) as error:
            raise DataError(_advice(published, remote.hub, error, part)) from error
        if not remote.sha256 or sha256_of_file(part) == remote.sha256:
            break
        part.unlink()
        if attempt == 2:
            raise DataError(
                f"{published.name}: twice the file from {remote.url} had another SHA-256 than "
                f"{remote.sha256}; nothing was kept. Try another hub with --hub"
            )
    part.replace(path)
    return path


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _url(published: Published, hub: Hub) -> str:
    variable, default = _ENDPOINTS[hub]
    endpoint = os.environ.get(variable, default).rstrip("/")
    path = published.file.path
    if hub == "hf":
        where = f"{published.set.hf}/resolve/{published.set.revision}/{urllib.parse.quote(path)}"
        return f"{endpoint}/datasets/{where}"
    query = urllib.parse.urlencode(
        {"Revision": published.set.modelscope_revision, "FilePath": path}
    )
    return f"{endpoint}/api/v1/datasets/{published.set.modelscope}/repo?{query}"


def _modelscope_sha256(published: Published, hub: Hub) -> str | None:
    """Return the SHA-256 of ModelScope's listing; None when it cannot be had."""
    if hub != "modelscope":
        return None
    endpoint = os.environ.get(*_ENDPOINTS[hub]).rstrip("/")
    root = str(Path(published.file.path).parent)
    query = urllib.parse.urlencode(
        {"Revision": published.set.modelscope_revision, "Root": "" if root == "." else root}
    )
    url = f"{endpoint}/api/v1/datasets/{published.set.modelscope}/repo/tree?{query}"
    try:
        with _open(urllib.request.Request(url), hub) as answer:
            listed = json.load(answer)["Data"]["Files"]
    except (OSError, _Refused, http.client.HTTPException, ValueError, KeyError, TypeError):
        return None
    found = [one.get("Sha256") for one in listed if one.get("Path") == published.file.path]
    return found[0] or None if found else None


def _open(request: urllib.request.Request, hub: Hub) -> http.client.HTTPResponse:
    """Send a request. Raises OSError for a connection that fails, _Refused for a status 4xx."""
    if token := os.environ.get(_TOKENS[hub]):
        request.add_header("Authorization", f"Bearer {token}")
    request.add_header("User-Agent", "minimind")
    try:
        answer: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=_STALL)
    except urllib.error.HTTPError as error:
        if error.code < 500 and error.code not in (408, 429):
            raise _Refused(f"HTTP {error.code} {error.reason}") from error
        raise OSError(f"HTTP {error.code} {error.reason}") from error
    return answer


def _fetch(remote: Remote, part: Path, progress: Progress) -> None:
    """Append to `part` until it is complete; a broken connection is resumed."""
    failures = 0
    while True:
        have = part.stat().st_size if part.exists() else 0
        if remote.size is not None and have > remote.size:
            part.unlink()
            have = 0
        if have == remote.size:
            return
        try:
            _append(remote, part, have, progress)
            if remote.size is None:
                return
        except (OSError, http.client.HTTPException):
            gained = part.exists() and part.stat().st_size > have
            failures = 0 if gained else failures + 1
            if failures >= _RETRIES:
                raise
            time.sleep(min(2.0**failures, 30.0) / 4)


def _append(remote: Remote, part: Path, have: int, progress: Progress) -> None:
    request = urllib.request.Request(remote.url)
    if have:
        request.add_header("Range", f"bytes={have}-")
    with _open(request, remote.hub) as answer:
        resumed = answer.status == 206
        with part.open("ab" if resumed else "wb") as file:
            done = have if resumed else 0
            while chunk := answer.read(_CHUNK):
                file.write(chunk)
                done += len(chunk)
                progress(done, remote.size)
    if remote.size is not None and done < remote.size:
        raise OSError(f"the connection ended after {done:,} of {remote.size:,} bytes")


def _check_room(part: Path, remote: Remote) -> None:
    have = part.stat().st_size if part.exists() else 0
    free = shutil.disk_usage(part.parent).free
    if remote.size is not None and remote.size - have + _SPARE > free:
        raise ResourceError(
            f"{part.parent}: {remote.size - have:,} bytes are to be downloaded and {free:,} are "
            "free; free some space, or give another folder with --out"
        )


def _advice(published: Published, hub: Hub, error: Exception, part: Path | None = None) -> str:
    """Say what failed and what helps: another hub, a token, or what a mirror is known for."""
    reason = str(getattr(error, "reason", error)) or type(error).__name__
    host = urllib.parse.urlsplit(_url(published, hub)).hostname
    lines = [f"{published.name}: {host} does not give it ({reason})."]
    if "401" in reason or "403" in reason:
        lines.append(f"The set may need an account: accept its terms, then set {_TOKENS[hub]}.")
    elif "404" in reason:
        lines.append("It may have been moved or renamed since this version of minimind.")
    elif hub == "hf" and os.environ.get("HF_ENDPOINT"):
        lines.append(
            "Mirrors of huggingface.co redirect large files to hosts that may be unreachable here."
        )
    others = [one for one in HUBS if one != hub and getattr(published.set, one)]
    if others:
        lines.append(f"Try --hub {others[0]}.")
    elif hub == "hf" and not os.environ.get("HF_ENDPOINT"):
        lines.append("Where huggingface.co cannot be reached, HF_ENDPOINT names a mirror.")
    if part and part.exists():
        lines.append("The same command continues the download.")
    lines.append(f"Or download {_url(published, hub)} elsewhere.")
    return " ".join(lines)
