"""Model directory to a folder of static files: a chat page that runs the model in the browser.

The arithmetic is wllama's: llama.cpp compiled to WebAssembly, published on npm. It is downloaded
once, checked against its published SHA-512 and kept in the cache folder.
"""

import base64
import hashlib
import io
import json
import shutil
import tarfile
import urllib.error
import urllib.request
from importlib.resources import files
from pathlib import Path

from minimind.errors import ResourceError, UsageError
from minimind.export.gguf import GGUFReport, Progress, export_gguf
from minimind.files import write_atomically
from minimind.model import read_config
from minimind.paths import cache_folder

WLLAMA = "3.13.0"
_URL = f"https://registry.npmjs.org/@wllama/wllama/-/wllama-{WLLAMA}.tgz"
_SHA512 = (  # base64, as npm publishes it
    "ZvoRdQAn+E+18EvQ9qS036gudiI9rbZRBJgG/qNICPPwrA0Y6SMMdbziz/j7K/0WxcbJlhaRraVIYsnEy732NA=="
)
_FILES = {
    "package/esm/index.min.js": "index.min.js",
    "package/esm/wasm/wllama.wasm": "wllama.wasm",
    "package/LICENCE": "LICENCE",
}
_PAGE = ("index.html", "app.js", "style.css")
_TIMEOUT = 60.0  # seconds without a byte


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

    name: the page's title. wllama: the npm package as a .tgz file, for a machine without a network.
    Raises UsageError when `out` holds something else, ResourceError when wllama cannot be fetched
    or is not the published file; otherwise as `export_gguf`.
    """
    if out.exists() and any(out.iterdir()) and not (out / "page.json").is_file():
        raise UsageError(f"{out} is not empty and holds no page; give another folder")
    package = _read_package(wllama)
    report = export_gguf(
        directory, out / f"model-{type}.gguf", type=type, adapter=adapter, progress=progress
    )
    engine = out / "wllama"
    engine.mkdir(exist_ok=True)
    for member, file in _FILES.items():
        (engine / file).write_bytes(package[member])
    for file in _PAGE:
        shutil.copyfile(str(files("minimind.export") / "page" / file), out / file)
    config = read_config(directory)
    page = {
        "name": name,
        "file": report.path.name,
        "size": report.size,
        "context": config.max_position_embeddings,
        "cache_type": "f32" if type == "f32" else "f16",
    }
    write_atomically(out / "page.json", json.dumps(page, ensure_ascii=False, indent=2) + "\n")
    return report


def _read_package(file: Path | None) -> dict[str, bytes]:
    """Return the needed members of the npm package: from a file, the cache or the network."""
    cached = cache_folder() / f"wllama-{WLLAMA}.tgz"
    content = None
    if file:
        content = file.read_bytes()
        if not _is_published(content):
            raise UsageError(f"{file} is not wllama {WLLAMA} as npm publishes it ({_URL})")
    elif cached.is_file():
        content = cached.read_bytes()
        content = content if _is_published(content) else None
    if content is None:
        content = _download()
        cached.parent.mkdir(parents=True, exist_ok=True)
        part = cached.with_suffix(".part")
        part.write_bytes(content)
        part.replace(cached)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        members = {name: archive.extractfile(name) for name in _FILES}
        return {name: member.read() for name, member in members.items() if member}


def _download() -> bytes:
    try:
        with urllib.request.urlopen(_URL, timeout=_TIMEOUT) as answer:
            content: bytes = answer.read()
    except (OSError, urllib.error.URLError) as error:
        raise ResourceError(
            f"{_URL}: cannot be downloaded ({getattr(error, 'reason', error)}). Download it on "
            "another machine and give the file with --wllama"
        ) from error
    if not _is_published(content):
        raise ResourceError(f"{_URL}: the download differs from the published file; try again")
    return content


def _is_published(content: bytes) -> bool:
    return base64.b64encode(hashlib.sha512(content).digest()).decode() == _SHA512
