"""Publish a model directory on the Hugging Face Hub or on ModelScope, with its model card.

huggingface_hub and modelscope-hub upload; they retry, and skip large files that the hub has.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from minimind.data.hub import HUB_NAMES, Hub
from minimind.errors import ResourceError, ServiceError, UsageError, install_line
from minimind.files import write_atomically

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_NAME = re.compile(rf"{_PART}/{_PART}")
_LOGIN: dict[Hub, str] = {
    "hf": "set HF_TOKEN, or run `hf auth login`",
    "modelscope": "set MODELSCOPE_API_TOKEN",
}


def check_repository_name(name: str) -> None:
    """Raise UsageError unless `name` is owner/name as both hubs accept it."""
    is_valid = _NAME.fullmatch(name) and not name.endswith(".git")
    if not is_valid or ".." in name or "--" in name:
        raise UsageError(
            f"{name!r} is not the name of a repository; give owner/name in letters, digits, "
            "-, _ and ., for example alice/my-minimind; it cannot end in -, . or .git"
        )


def push(
    directory: Path,
    card: Mapping[str, str],
    repository: str,
    *,
    hub: Hub,
    licence: str | None,
    private: bool,
) -> str:
    """Upload a model directory and its card in one commit; return the address of the model.

    card: text by path in the repository; a file of the same name in the directory has precedence.
    Creates the repository if there is none. Raises UsageError without the package, a token or (on
    ModelScope) a licence; ServiceError when the hub refuses or cannot be reached.
    """
    check_repository_name(repository)
    if hub == "modelscope" and not licence:
        raise UsageError("ModelScope records a licence for each repository; add --license ID")
    with _staged(directory, card) as folder:
        if hub == "hf":
            return _push_hf(folder, repository, private)
        return _push_modelscope(folder, repository, licence, private)


def files_of(directory: Path) -> list[Path]:
    """Return the files of a model directory that are published, without hidden ones."""
    return sorted(
        path
        for path in directory.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(directory).parts)
    )


@contextmanager
def _staged(directory: Path, card: Mapping[str, str]) -> Iterator[Path]:
    """Yield a folder with everything that is uploaded; model files are linked where possible."""
    with tempfile.TemporaryDirectory(prefix=".push-", dir=directory.parent) as name:
        folder = Path(name)
        for path, text in card.items():
            write_atomically(folder / path, text)
        for file in files_of(directory):
            target = folder / file.relative_to(directory)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            try:
                os.link(file, target)
            except OSError:
                try:
                    shutil.copyfile(file, target)
                except OSError as error:
                    raise ResourceError(f"{file}: cannot be copied: {error.strerror}") from None
        yield folder


def _push_hf(folder: Path, repository: str, private: bool) -> str:
    if "HF_ENDPOINT" in os.environ:
        # Addresses of the Xet protocol name huggingface.co even on a mirror.
        os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    try:
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.errors import HfHubHTTPError, HTTPError
    except ImportError:
        raise UsageError(f"huggingface_hub is not installed; {install_line('push')}") from None
    if not get_token():
        raise _no_token("hf")
    api = HfApi(library_name="minimind")
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Upload with minimind"
        )
    except HfHubHTTPError as error:
        raise _refused("hf", repository, error.response.status_code, error) from None
    except (HTTPError, OSError) as error:
        raise _unreachable("hf", repository, error) from None
    return str(commit.repo_url)


def _push_modelscope(folder: Path, repository: str, licence: str | None, private: bool) -> str:
    try:
        import requests
        from modelscope_hub import HubApi
        from modelscope_hub.errors import HubError
    except ImportError:
        raise UsageError(f"modelscope-hub is not installed; {install_line('push')}") from None
    token = os.environ.get("MODELSCOPE_API_TOKEN")
    if not token:
        raise _no_token("modelscope")
    endpoint = os.environ.get("MODELSCOPE_ENDPOINT", "https://modelscope.cn").rstrip("/")
    api = HubApi(endpoint=endpoint, token=token)
    try:
        if not api.repo_exists(repository, "model"):
            visibility = "private" if private else "public"
            api.create_repo(repository, "model", visibility=visibility, license=licence)
        api.upload_folder(
            repository, "model", folder, commit_message="Upload with minimind", disable_tqdm=False
        )
    except HubError as error:
        raise _refused(
            "modelscope", repository, getattr(error, "status_code", None), error
        ) from None
    except (requests.RequestException, OSError) as error:
        raise _unreachable("modelscope", repository, error) from None
    return f"{endpoint}/models/{repository}"


def _no_token(hub: Hub) -> UsageError:
    return UsageError(f"there is no access token for {HUB_NAMES[hub]}: {_LOGIN[hub]}")


def _refused(hub: Hub, repository: str, status: int | None, error: Exception) -> ServiceError:
    advice = {
        401: f"the access token is not valid; {_LOGIN[hub]}",
        403: "the access token does not permit writing there; create one with write access, and "
        "check the owner",
        404: "there is no such owner",
    }
    reason = advice.get(status or 0, str(error).strip().split("\n")[0])
    return ServiceError(f"{HUB_NAMES[hub]} refused {repository} (HTTP {status}): {reason}")


def _unreachable(hub: Hub, repository: str, error: Exception) -> ServiceError:
    return ServiceError(
        f"{HUB_NAMES[hub]}: the upload of {repository} failed: {error}. Give the same command "
        "again; large files that arrived are not sent again"
    )
