"""Model directory to a folder of static files: a chat page that runs the model in the browser.

wllama, which is llama.cpp compiled to WebAssembly, computes. Its npm package is downloaded once,
compared with the published SHA-512, and kept in the cache folder.

    index.html, app.js, style.css, sw.js    the page; sw.js keeps it usable offline
    page.json                               name and context length of the model, names of the files
    model-HASH.gguf                         the model
    wllama-VERSION/                         wllama and the licences

The two last names change with their content, so browsers may keep these files for ever.
"""

import base64
import hashlib
import io
import os
import shutil
import tarfile
import tempfile
import urllib.request
from http.client import HTTPException
from importlib.resources import files
from pathlib import Path

from minimind.errors import ResourceError, UsageError
from minimind.export.gguf import GGUFReport, Progress, export_gguf
from minimind.files import atomic_file, read_json_object, write_json
from minimind.model import read_config
from minimind.paths import cache_folder

WLLAMA = "3.13.0"
_REGISTRY = "https://registry.npmjs.org"  # npm's environment variable chooses a mirror
_REGISTRY_VARIABLE = "NPM_CONFIG_REGISTRY"
_PACKAGE_PATH = f"@wllama/wllama/-/wllama-{WLLAMA}.tgz"
_SHA512 = (  # base64, as npm publishes it
    "ZvoRdQAn+E+18EvQ9qS036gudiI9rbZRBJgG/qNICPPwrA0Y6SMMdbziz/j7K/0WxcbJlhaRraVIYsnEy732NA=="
)
_MEMBERS = {
    "package/esm/index.min.js": "index.min.js",
    "package/esm/wasm/wllama.wasm": "wllama.wasm",
    "package/LICENCE": "LICENCE",
}
# The WebAssembly file contains llama.cpp, under the same licence (MIT) of other authors.
_WLLAMA_AUTHOR = b"Copyright (c) 2024 Xuan Son NGUYEN"
_LLAMA_CPP_AUTHORS = b"Copyright (c) 2023-2026 The ggml authors"
_PAGE_FILES = ("index.html", "app.js", "style.css", "sw.js")
_SETTINGS = "page.json"
_MAX_CONTEXT = 4096  # tokens; the KV cache of a longer context would fill a browser tab's memory
_TIMEOUT_S = 60.0  # without receiving a byte


def export_web(
    directory: Path,
    out: Path,
    *,
    name: str,
    type: str = "q8_0",
    adapter: Path | None = None,
    wllama: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> GGUFReport:
    """Write the page, the model as GGUF and wllama into the folder `out`.

    An earlier page in `out` is replaced; its other files stay. name: the title of the page.
    wllama: the npm package as a .tgz file, for a machine without a network. Raises UsageError when
    `out` holds something else, or `wllama` is another file; ResourceError when the download fails
    or a file cannot be written; otherwise as `export_gguf`.
    """
    if out.is_file() or (not holds_page(out) and out.is_dir() and any(out.iterdir())):
        raise UsageError(f"{out} already exists and holds no exported page; choose another --out")
    package = _read_package(wllama)
    parent = out.resolve().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".page-", dir=parent) as work:
            folder = Path(work)
            report = export_gguf(
                directory, folder / "model.gguf", type=type, adapter=adapter, progress=progress
            )
            _add_page(folder, name, report, package, read_config(directory).max_position_embeddings)
            _move_page(folder, out)
    except OSError as error:
        raise ResourceError(
            f"{out}: cannot be written: {error.strerror or error}; free some disk space, or "
            "choose another --out"
        ) from error
    report.path = out
    return report


def holds_page(out: Path) -> bool:
    """Return True if the folder contains an exported page."""
    return (out / _SETTINGS).is_file()


def _add_page(
    folder: Path, name: str, report: GGUFReport, package: dict[str, bytes], context: int
) -> None:
    """Add all files but the model, which gets its final name."""
    with report.path.open("rb") as file:
        model = f"model-{hashlib.file_digest(file, 'sha256').hexdigest()[:12]}.gguf"
    report.path.rename(folder / model)
    engine = folder / f"wllama-{WLLAMA}"
    engine.mkdir()
    for member, file_name in _MEMBERS.items():
        (engine / file_name).write_bytes(package[member])
    licence = package["package/LICENCE"].replace(_WLLAMA_AUTHOR, _LLAMA_CPP_AUTHORS)
    (engine / "LICENCE-llama.cpp").write_bytes(licence)
    for file_name in _PAGE_FILES:
        content = (files("minimind.export") / "page" / file_name).read_bytes()
        (folder / file_name).write_bytes(content)
    settings = {
        "name": name,
        "type": report.type,
        "model": model,
        "size": report.size,
        "engine": engine.name,
        "context": min(context, _MAX_CONTEXT),
        "cache_type": "f32" if report.type == "f32" else "f16",
    }
    write_json(folder / _SETTINGS, settings)


def _move_page(folder: Path, out: Path) -> None:
    """Move the finished page to `out`; `page.json` is replaced last."""
    old = read_json_object(out / _SETTINGS) if holds_page(out) else {}
    out.mkdir(exist_ok=True)
    entries = sorted(folder.iterdir(), key=lambda path: path.name == _SETTINGS)
    for entry in entries:
        if (out / entry.name).is_dir():
            shutil.rmtree(out / entry.name)
        os.replace(entry, out / entry.name)
    new = {entry.name for entry in entries}
    for key in ("model", "engine"):
        stale = out / Path(str(old.get(key, ""))).name
        if stale != out and stale.name not in new:
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink(missing_ok=True)


def _read_package(file: Path | None) -> dict[str, bytes]:
    """Return the needed members of the npm package: from a file, the cache or the network."""
    cached = cache_folder() / f"wllama-{WLLAMA}.tgz"
    content = (file or cached).read_bytes() if file or cached.is_file() else b""
    if not _is_published(content):
        if file:
            raise UsageError(
                f"{file} is not wllama {WLLAMA} as npm publishes it. Download "
                f"{_REGISTRY}/{_PACKAGE_PATH}"
            )
        content = _download()
        cached.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(cached) as temporary:
            temporary.write_bytes(content)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        members = {name: archive.extractfile(name) for name in _MEMBERS}
        return {name: member.read() for name, member in members.items() if member}


def _download() -> bytes:
    url = f"{os.environ.get(_REGISTRY_VARIABLE, _REGISTRY).rstrip('/')}/{_PACKAGE_PATH}"
    remedy = (
        f"Try again, set {_REGISTRY_VARIABLE} to a mirror of npm, or download the file on another "
        f"machine and give it: --wllama wllama-{WLLAMA}.tgz"
    )
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer:
            content: bytes = answer.read()
    except (OSError, ValueError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise ResourceError(f"{url}: cannot be downloaded: {reason}. {remedy}") from error
    if not _is_published(content):
        raise ResourceError(f"{url}: the download is not the published file. {remedy}")
    return content


def _is_published(content: bytes) -> bool:
    return base64.b64encode(hashlib.sha512(content).digest()).decode() == _SHA512
