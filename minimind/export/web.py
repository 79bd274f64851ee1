"""Model directory to a folder of static files: a chat page that runs the model in the browser.

wllama, which is llama.cpp compiled to WebAssembly, computes. Its npm packages are downloaded once,
compared with the published SHA-512, and kept in the cache folder.

    index.html, app.js, style.css, sw.js    the page; sw.js keeps it usable offline
    page.json                               name and context length of the model, names of the files
    model-HASH.gguf                         the model
    wllama-VERSION/                         wllama and the licences

The last two names change with their content, so browsers may keep these files indefinitely.
"""

import base64
import hashlib
import io
import os
import shutil
import tarfile
import tempfile
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from importlib.resources import files
from pathlib import Path

from minimind.errors import ResourceError, UsageError, unwritable
from minimind.export.gguf import GGUFReport, Progress, export_gguf, normalized_type
from minimind.files import atomic_file, read_json_object, write_json
from minimind.model import read_config
from minimind.paths import cache_folder

WLLAMA = "3.13.0"
_REGISTRY = "https://registry.npmjs.org"  # npm's environment variable chooses a mirror
_REGISTRY_VARIABLE = "NPM_CONFIG_REGISTRY"
_TIMEOUT_S = 60.0  # without receiving a byte


@dataclass(frozen=True)
class _Package:
    """An npm package: which files of it the page needs, by their names in the package."""

    name: str
    sha512: str  # base64, as npm publishes it
    members: dict[str, str]

    @property
    def file(self) -> str:
        return f"{self.name}-{WLLAMA}.tgz"

    def url(self, registry: str = _REGISTRY) -> str:
        return f"{registry.rstrip('/')}/@wllama/{self.name}/-/{self.file}"

    def matches(self, content: bytes) -> bool:
        return base64.b64encode(hashlib.sha512(content).digest()).decode() == self.sha512


_PACKAGES = (
    _Package(
        "wllama",
        "ZvoRdQAn+E+18EvQ9qS036gudiI9rbZRBJgG/qNICPPwrA0Y6SMMdbziz/j7K/0WxcbJlhaRraVIYsnEy732NA==",
        {
            "package/esm/index.min.js": "index.min.js",
            "package/esm/wasm/wllama.wasm": "wllama.wasm",
            "package/LICENCE": "LICENCE.txt",
        },
    ),
    _Package(  # a slower build without the WebAssembly features that Safari lacks
        "wllama-compat",
        "MSWwyzVXpwkstvIGzOsQ9jlRm8kY5S5J0Gdw4E6M9mXqhgO/5tj+YNfxSoqN1GvsAOwui95JPtwX3hO6VZkbzg==",
        {"package/wasm/wllama.js": "compat.js", "package/wasm/wllama.wasm": "compat.wasm"},
    ),
)
# The WebAssembly file contains llama.cpp, under the same licence (MIT) of other authors.
_WLLAMA_AUTHOR = b"Copyright (c) 2024 Xuan Son NGUYEN"
_LLAMA_CPP_AUTHORS = b"Copyright (c) 2023-2026 The ggml authors"
_PAGE_FILES = ("index.html", "app.js", "style.css", "sw.js")
_SETTINGS = "page.json"
_MAX_CONTEXT = 4096  # tokens; the KV cache of a longer context would fill a browser tab's memory


def export_web(
    directory: Path,
    out: Path,
    *,
    name: str,
    type: str = "q8_0",
    adapter: Path | None = None,
    wllama: Sequence[Path] = (),
    progress: Progress = lambda done, total: None,
) -> GGUFReport:
    """Write the page, the model as GGUF and wllama into the folder `out`.

    An earlier page in `out` is replaced; its other files stay. name: the title of the page.
    wllama: npm packages as .tgz files, for a machine without a network. Raises UsageError when
    `out` holds something else, or for another file in `wllama`; ResourceError when a download fails
    or a file cannot be written; otherwise as `export_gguf`.
    """
    if out.is_file() or (not holds_page(out) and out.is_dir() and any(out.iterdir())):
        raise UsageError(f"{out} already exists and holds no exported page; choose another --out")
    type = normalized_type(type)  # before a download
    engine = _read_engine(wllama)
    parent = out.resolve().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".page-", dir=parent) as work:
            folder = Path(work)
            report = export_gguf(
                directory, folder / "model.gguf", type=type, adapter=adapter, progress=progress
            )
            _add_page(folder, name, report, engine, read_config(directory).max_position_embeddings)
            _move_page(folder, out)
    except OSError as error:
        raise unwritable(out, error) from error
    report.path = out
    return report


def holds_page(out: Path) -> bool:
    """Return True if the folder contains an exported page."""
    return (out / _SETTINGS).is_file()


def _add_page(
    folder: Path, name: str, report: GGUFReport, engine: dict[str, bytes], context: int
) -> None:
    """Add all files but the model, which gets its final name."""
    with report.path.open("rb") as file:
        model = f"model-{hashlib.file_digest(file, 'sha256').hexdigest()[:12]}.gguf"
    report.path.rename(folder / model)
    engine_folder = folder / f"wllama-{WLLAMA}"
    engine_folder.mkdir()
    licence = engine["LICENCE.txt"].replace(_WLLAMA_AUTHOR, _LLAMA_CPP_AUTHORS)
    for file_name, content in (engine | {"LICENCE-llama.cpp.txt": licence}).items():
        (engine_folder / file_name).write_bytes(content)
    for file_name in _PAGE_FILES:
        page_file = files("minimind.export") / "page" / file_name
        (folder / file_name).write_bytes(page_file.read_bytes())
    settings = {
        "name": name,
        "type": report.type,
        "model": model,
        "size": report.size,
        "engine": engine_folder.name,
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


def _read_engine(given: Sequence[Path]) -> dict[str, bytes]:
    """Return wllama's files by name, from `given` packages, the cache or the network."""
    contents = [(path, path.read_bytes()) for path in given]
    for path, content in contents:
        if not any(package.matches(content) for package in _PACKAGES):
            urls = " and ".join(package.url() for package in _PACKAGES)
            raise UsageError(f"{path} is not wllama {WLLAMA} as npm publishes it. Download {urls}")
    result = {}
    for package in _PACKAGES:
        matching = [content for _, content in contents if package.matches(content)]
        content = matching[0] if matching else _cached(package)
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            for member, name in package.members.items():
                file = archive.extractfile(member)
                assert file is not None, "the hash fixes the content"
                result[name] = file.read()
    return result


def _cached(package: _Package) -> bytes:
    """Return a package from the cache folder, to which it is downloaded first if needed."""
    path = cache_folder() / package.file
    content = path.read_bytes() if path.is_file() else b""
    if not package.matches(content):
        content = _download(package)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            temporary.write_bytes(content)
    return content


def _download(package: _Package) -> bytes:
    url = package.url(os.environ.get(_REGISTRY_VARIABLE, _REGISTRY))
    files = " ".join(f"--wllama {package.file}" for package in _PACKAGES)
    remedy = (
        f"Try again, set {_REGISTRY_VARIABLE} to a mirror of npm, or download "
        f"{' and '.join(package.url() for package in _PACKAGES)} on another machine and add "
        f"{files}"
    )
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer:
            content: bytes = answer.read()
    except (OSError, ValueError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise ResourceError(f"{url}: cannot be downloaded: {reason}. {remedy}") from error
    if not package.matches(content):
        raise ResourceError(f"{url}: the download is not the published file. {remedy}")
    return content
