"""Outputs of the chapters: what is stale, and how it is made fresh.

`outputs/manifest.json` of a chapter has the hash of every file that its script read or imported,
and of every file that it wrote. Outputs are fresh while all of them match. Comments and docstrings
of imported modules do not count, so that better wording does not run every script again.
"""

import ast
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tokenize
from functools import cache
from pathlib import Path

from docs.book.chapters import Chapter

_MANIFEST = "manifest.json"


def stale(chapter: Chapter) -> list[str]:
    """Return the inputs and outputs of a chapter that differ from its manifest; empty if fresh."""
    manifest = chapter.outputs / _MANIFEST
    if not manifest.is_file():
        return [chapter.path_in_repository(f"outputs/{_MANIFEST}")]
    recorded = json.loads(manifest.read_text("utf-8"))
    hashes = recorded["inputs"] | {
        chapter.path_in_repository(f"outputs/{path.name}"): None
        for path in chapter.outputs.iterdir()
        if path.name != _MANIFEST
    }
    hashes |= recorded["outputs"]
    return [
        name
        for name, digest in hashes.items()
        if hash_of(chapter.root / name) != digest
    ]


def refresh(chapter: Chapter) -> None:
    """Run the script of a chapter and replace its outputs. Exits if the script fails."""
    with tempfile.TemporaryDirectory(prefix="minimind-book-") as folder:
        out = Path(folder)
        run_script(chapter, out)
        inputs = json.loads((out / "inputs.json").read_text("utf-8"))
        (out / "inputs.json").unlink()
        shutil.rmtree(chapter.outputs, ignore_errors=True)
        shutil.copytree(out, chapter.outputs)
    hash_of.cache_clear()
    names = sorted(path.name for path in chapter.outputs.iterdir())
    outputs = [chapter.path_in_repository(f"outputs/{name}") for name in names]
    manifest = {
        "inputs": {name: hash_of(chapter.root / name) for name in inputs},
        "outputs": {name: hash_of(chapter.root / name) for name in outputs},
    }
    text = json.dumps(manifest, ensure_ascii=False, indent=1) + "\n"
    (chapter.outputs / _MANIFEST).write_text(text, encoding="utf-8", newline="\n")


def run_script(chapter: Chapter, out: Path) -> None:
    """Run the script of a chapter in a separate process, with one thread; exit if it fails."""
    command = [sys.executable, "-m", "docs.book.execute", chapter.stem, out]
    path = os.pathsep.join(
        filter(None, [str(chapter.root), os.environ.get("PYTHONPATH")])
    )
    # The compiled kernels sum in another order on each kind of processor.
    variables = {
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",
        "MINIMIND_NATIVE": "0",
    }
    done = subprocess.run(command, cwd=chapter.root, env=os.environ | variables)
    if done.returncode:
        sys.exit(
            f"book: {chapter.path_in_repository('chapter.py')} failed; see above"
        )


@cache
def hash_of(path: Path) -> str | None:
    """Return the start of a file's SHA-256, or None if it is missing.

    An imported module is hashed without comments and docstrings.
    """
    if not path.is_file():
        return None
    content = path.read_bytes()
    if path.suffix == ".py" and path.name != "chapter.py":
        content = _code_of(content.decode()).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def _code_of(source: str) -> str:
    """Return the lines of a module without comments, docstrings and blank lines."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, documented)
            and ast.get_docstring(node, clean=False) is not None
        ):
            first, last = node.body[0].lineno, node.body[0].end_lineno or 0
            lines[first - 1 : last] = [""] * (last - first + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip())
