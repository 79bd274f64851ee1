"""The HTTP interfaces of the Hugging Face Hub and of ModelScope: files, hashes, addresses.

    HF_ENDPOINT, MODELSCOPE_ENDPOINT   other servers, such as a mirror
    HF_TOKEN, MODELSCOPE_API_TOKEN     access tokens; sent only to the hub itself
    HF_HUB_DOWNLOAD_TIMEOUT            seconds without data after which a connection is given up
    HF_HUB_OFFLINE                     1: no network access

Both hubs publish the SHA-256 of large files. Of small files Hugging Face has only the git blob id.
"""

import http.client
import json
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from minimind.errors import DataError, UsageError
from minimind.version import __version__

Hub = Literal["modelscope", "hf"]
Kind = Literal["datasets", "models"]
HUBS: tuple[Hub, ...] = ("modelscope", "hf")  # in order of preference
HUB_NAMES: dict[Hub, str] = {"modelscope": "ModelScope", "hf": "Hugging Face"}
_ENDPOINTS: dict[Hub, tuple[str, str]] = {
    "hf": ("HF_ENDPOINT", "https://huggingface.co"),
    "modelscope": ("MODELSCOPE_ENDPOINT", "https://modelscope.cn"),
}
_TOKENS: dict[Hub, str] = {"hf": "HF_TOKEN", "modelscope": "MODELSCOPE_API_TOKEN"}
_DEFAULT_REVISION: dict[Hub, str] = {"hf": "main", "modelscope": "master"}
_TIMEOUT_S = 30.0
_MAX_REDIRECTS = 5
_PAGE_SIZE = 200  # files per page of a ModelScope listing
_MAX_LISTING_BYTES = 64 << 20
_SHORT_COMMIT = re.compile(r"[0-9a-f]{7,39}")
_TRANSIENT_STATUS = (408, 425, 429)  # and 5xx: the same request may succeed later


class HubError(DataError):
    """A hub that refuses a request; a repetition would have the same result."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class TransientError(Exception):
    """A request that failed and may succeed later: connection, timeout, busy server.

    host: the host that failed, which differs from that of the hub after a redirect.
    retry_after: seconds, if the server names them.
    """

    def __init__(self, reason: str, host: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.host, self.retry_after = host, retry_after


@dataclass(frozen=True)
class Repository:
    """A repository on a hub. revision: a commit, a branch or a tag; None: the default branch."""

    hub: Hub
    id: str
    revision: str | None = None
    kind: Kind = "datasets"

    @property
    def endpoint(self) -> str:
        """Base URL of the hub, without a slash at the end."""
        return os.environ.get(*_ENDPOINTS[self.hub]).rstrip("/")

    @property
    def host(self) -> str:
        """Host name and port of the hub."""
        return urllib.parse.urlsplit(self.endpoint).netloc

    @property
    def branch(self) -> str:
        """The revision, or the name of the default branch."""
        return self.revision or _DEFAULT_REVISION[self.hub]

    def file_url(self, path: str) -> str:
        """Return the address of a file, which also works in a browser."""
        if self.hub == "hf":
            prefix = "datasets/" if self.kind == "datasets" else ""
            name = f"{urllib.parse.quote(self.branch, safe='')}/{urllib.parse.quote(path)}"
            return f"{self.endpoint}/{prefix}{self.id}/resolve/{name}"
        return f"{self.api}/repo?{_query(Revision=self.branch, FilePath=path)}"

    @property
    def api(self) -> str:
        """Base URL of requests about the repository."""
        version = "api" if self.hub == "hf" else "api/v1"
        return f"{self.endpoint}/{version}/{self.kind}/{self.id}"


@dataclass(frozen=True)
class HubFile:
    """A file of a repository, as the hub lists it. size: bytes; None: not listed."""

    path: str
    size: int | None
    sha256: str | None = None
    blob_id: str | None = None  # SHA-1 of git, only of files without a SHA-256


@dataclass(frozen=True)
class Listing:
    """The files of a repository at one revision, by path, and the licence on its page."""

    repository: Repository
    files: Mapping[str, HubFile]
    licence: str | None = None


def list_repository(repository: Repository) -> Listing:
    """Return the files of a repository. Raises HubError and TransientError."""
    return _list_hf(repository) if repository.hub == "hf" else _list_modelscope(repository)


def open_file(repository: Repository, path: str, start: int = 0) -> http.client.HTTPResponse:
    """Request a file from the byte `start` on. Raises HubError and TransientError."""
    headers = {"Range": f"bytes={start}-"} if start else {}
    return _open(repository, repository.file_url(path), headers)


def _list_hf(repository: Repository) -> Listing:
    revision = repository.branch
    if _SHORT_COMMIT.fullmatch(revision):
        revision = _full_commit(repository, revision)
    url = f"{repository.api}/revision/{urllib.parse.quote(revision, safe='')}?blobs=true"
    answer = _get_json(repository, url)
    files = {}
    for entry in answer["siblings"]:
        large = entry.get("lfs") or {}
        sha256 = large.get("sha256") or large.get("oid")
        file = HubFile(
            entry["rfilename"], large.get("size", entry.get("size")), sha256, entry.get("blobId")
        )
        files[file.path] = replace(file, blob_id=None) if sha256 else file
    licence = (answer.get("cardData") or {}).get("license")
    if isinstance(licence, list):
        licence = ", ".join(map(str, licence))
    return Listing(replace(repository, revision=answer["sha"]), files, licence)


def _full_commit(repository: Repository, short: str) -> str:
    """Return the commit of the default branch whose id begins with `short`."""
    commits = _get_json(repository, f"{repository.api}/commits/main?limit=1000")
    matches = [commit["id"] for commit in commits if commit["id"].startswith(short)]
    if len(matches) != 1:
        raise HubError(
            f"{repository.host} lists no commit {short} of {repository.id}; its history may have "
            "been rewritten",
            404,
        )
    return str(matches[0])


def _list_modelscope(repository: Repository) -> Listing:
    name = "tree" if repository.kind == "datasets" else "files"
    files: dict[str, HubFile] = {}
    for page in _modelscope_pages(repository, f"{repository.api}/repo/{name}"):
        for entry in page:
            if entry.get("Type") != "tree":
                path = entry["Path"]
                files[path] = HubFile(path, entry.get("Size"), entry.get("Sha256") or None)
    licence = None
    if repository.kind == "models":
        licence = _get_json(repository, repository.api)["Data"].get("License")
    return Listing(replace(repository, revision=repository.branch), files, licence or None)


def _modelscope_pages(repository: Repository, url: str) -> Iterator[list[dict[str, Any]]]:
    options = {"Revision": repository.branch, "Recursive": "True", "PageSize": _PAGE_SIZE}
    number = 1
    while True:
        data = _get_json(repository, f"{url}?{_query(**options, PageNumber=number)}")["Data"]
        page = data if isinstance(data, list) else data["Files"]
        yield page
        # Listings of models have no pages: a second request would return the same files.
        if len(page) < _PAGE_SIZE or repository.kind == "models":
            return
        number += 1


def _query(**values: object) -> str:
    return urllib.parse.urlencode(values)


def _get_json(repository: Repository, url: str) -> Any:
    """Return the JSON answer to a request. Raises HubError if it has another form."""
    with _open(repository, url, {}) as response:
        try:
            content = response.read(_MAX_LISTING_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise TransientError(_reason(error), repository.host) from error
    try:
        answer = json.loads(content)
        if repository.hub == "modelscope" and answer["Data"] is None:
            raise HubError(f"{repository.host}: {answer.get('Message') or 'no data'}", 404)
    except (ValueError, KeyError, TypeError):
        raise HubError(
            f"{repository.host} answered with something else than JSON, such as the page of a "
            f"login or a proxy ({url})"
        ) from None
    return answer


# --- HTTP


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Return redirects as errors: `_open` follows them, without tokens for other hosts."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


_opener = urllib.request.build_opener(_NoRedirect)


def check_online() -> None:
    """Raise UsageError if HF_HUB_OFFLINE forbids network access."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise UsageError("HF_HUB_OFFLINE is set, so nothing is downloaded; unset it to download")


def _open(repository: Repository, url: str, headers: Mapping[str, str]) -> http.client.HTTPResponse:
    """Send a GET request and follow redirects."""
    check_online()
    for _ in range(_MAX_REDIRECTS):
        host = urllib.parse.urlsplit(url).netloc
        request = urllib.request.Request(url, headers=_headers(repository, host) | dict(headers))
        try:
            response: http.client.HTTPResponse = _opener.open(request, timeout=_timeout())
            return response
        except urllib.error.HTTPError as error:
            with error:
                location = error.headers.get("Location")
                if 300 <= error.code < 400 and location:
                    url = urllib.parse.urljoin(url, location)
                    continue
                raise _status_error(repository, host, error) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise TransientError(_reason(error), host) from error
    raise HubError(f"{repository.host} redirects more than {_MAX_REDIRECTS} times, last to {url}")


def _headers(repository: Repository, host: str) -> dict[str, str]:
    headers = {"User-Agent": f"minimind/{__version__}"}
    token = os.environ.get(_TOKENS[repository.hub])
    if token and host == repository.host:
        headers["Authorization"] = f"Bearer {token}"
    return headers


def _timeout() -> float:
    try:
        return float(os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT", "")) or _TIMEOUT_S
    except ValueError:
        return _TIMEOUT_S


def _status_error(
    repository: Repository, host: str, error: urllib.error.HTTPError
) -> HubError | TransientError:
    reason = f"HTTP {error.code} {error.reason}".rstrip()
    if error.code in _TRANSIENT_STATUS or error.code >= 500:
        try:
            retry_after = float(error.headers.get("Retry-After") or 0)
        except ValueError:  # a date
            retry_after = 0.0
        return TransientError(reason, host, retry_after)
    token = _TOKENS[repository.hub]
    verb = "does not have" if error.code == 404 else "refuses"
    message = f"{host} {verb} {repository.id} at {repository.branch[:12]} ({reason})"
    if error.code in (401, 403):
        page = repository.file_url("").partition("/resolve/")[0]
        given = f"the token in {token} has no access" if token in os.environ else f"set {token}"
        message += (
            f". It may not exist, be private, or require that its terms are accepted on {page}; "
            f"then {given}"
        )
    return HubError(message, error.code)


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None) or error
    text = " ".join(str(reason).split()) or type(error).__name__
    if "CERTIFICATE_VERIFY_FAILED" in text:
        text += "; SSL_CERT_FILE names a file of root certificates"
    return text
