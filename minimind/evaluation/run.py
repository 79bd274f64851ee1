"""Tasks put to models: results written as they come, so that a stopped evaluation goes on.

<folder>/<task>.jsonl   a header that says of what model and questions, then a result a line
<folder>/<task>.json    the figures, once all is done
<folder>/<task>/…csv    for multiple choice, a table a subject
"""

import csv
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from minimind.errors import ResourceError, UsageError
from minimind.evaluation.choice import Choice
from minimind.evaluation.contamination import Contamination
from minimind.evaluation.tasks import Model, Result, Task

Progress = Callable[[int, int], None]


def evaluate(
    task: Task,
    model: Model,
    folder: Path,
    *,
    identity: Mapping[str, Any],
    contamination: Contamination | None = None,
    fresh: bool = False,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Put the task to the model, but for what was done before; the figures.

    identity: all that results depend on beside the task. Raises UsageError when the folder holds
    results of another model or of other questions, and ResourceError when nothing can be written.
    """
    path = folder / f"{file_name(task.name)}.jsonl"
    header = {**task.settings(), **identity}
    results = {} if fresh else read_results(path, header)
    done = {name for name, result in results.items() if "error" not in result}
    before, started = len(done), time.perf_counter()
    with writing(path, header, keep=bool(results)) as write:
        progress(before, len(task))
        for result in task.run(model, done):
            write(result)
            results[result["id"]] = result
            if "error" not in result:
                done.add(result["id"])
            progress(len(results), len(task))
    seconds = time.perf_counter() - started
    good = [result for result in results.values() if "error" not in result]
    summary = {
        "task": task.name,
        "model": model.name,
        **task.summary(good),
        **_faults(list(results.values()), task),
        "seconds": seconds,
        "asked_now": len(results) - before,
        "settings": header,
    }
    if contamination:
        without = [result for result in good if result["id"] not in contamination.found]
        summary["contamination"] = contamination.figures() | {"without": task.summary(without)}
    _write_json(path.with_suffix(".json"), summary)
    if isinstance(task, Choice):
        _write_tables(path.with_suffix(""), task.tables(good))
    return summary


def file_name(text: str) -> str:
    """A name that any file system takes."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-.") or "_"


def read_results(path: Path, header: Mapping[str, Any]) -> dict[str, Result]:
    """The whole lines of a file of results by id, the last of each; none where there is no file.

    Raises UsageError when they are of something else than `header` says.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ResourceError(f"{path}: cannot be read: {error.strerror}") from error
    lines = content.split(b"\n")[:-1]  # a line that was being written when the power failed is none
    if not lines:
        return {}
    found = _object(lines[0])
    if differing := sorted(key for key in {*found, *header} if found.get(key) != header.get(key)):
        raise UsageError(
            f"{path}: holds results of another evaluation ({', '.join(differing)} differ); "
            "give another --out, or --fresh to start over"
        )
    results = [result for line in lines[1:] if "id" in (result := _object(line))]
    return {str(result["id"]): result for result in results}


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


@contextmanager
def writing(
    path: Path, header: Mapping[str, Any], *, keep: bool
) -> Iterator[Callable[[Result], None]]:
    """Something that adds a line to the file; what is there is kept up to its last whole line."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file: IO[bytes] = path.open("r+b" if keep else "wb")
    except OSError as error:
        raise ResourceError(f"{path}: cannot be written: {error.strerror}") from error

    def write(value: Mapping[str, Any]) -> None:
        file.write(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        file.flush()

    with file:
        if keep:
            whole = file.read().rfind(b"\n") + 1
            file.truncate(whole)
            file.seek(whole)
        else:
            write(header)
        yield write


def _faults(results: Sequence[Result], task: Task) -> dict[str, Any]:
    """What went wrong: how many, and the first few of each."""
    errors = {result["id"]: result["error"] for result in results if "error" in result}
    return {
        "failed": len(errors),
        "errors": dict(list(errors.items())[:10]),
        "unreadable": task.bad.total,
        "first_unreadable": task.bad.first,
    }


def _write_json(path: Path, figures: Mapping[str, Any]) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(figures, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def _write_tables(folder: Path, tables: Mapping[str, list[dict[str, Any]]]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for subject, rows in tables.items():
        columns = list(dict.fromkeys(column for row in rows for column in row))
        path = folder / f"{file_name(subject)}.csv"
        with path.open("w", encoding="utf-8-sig", newline="") as file:  # which Excel wants
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
