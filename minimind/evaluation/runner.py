"""Run a task on a model; each result is stored at once, so that a run can be resumed.

<folder>/<task>.jsonl   a header that identifies model and task, then one result per line
<folder>/<task>.json    the metrics, when all items are done
<folder>/<task>/…csv    for multiple choice, a table per subject
"""

import csv
import hashlib
import io
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from minimind.errors import ResourceError, UsageError
from minimind.evaluation.contamination import Contamination
from minimind.evaluation.multiple_choice import MultipleChoice
from minimind.evaluation.tasks import Model, Result, Task
from minimind.files import write_atomically

Progress = Callable[[int, int], None]
_MAX_NAME = 200  # bytes of a file name; 255 are allowed, with the endings of temporary files


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
    """Run a task on a model and return the metrics.

    Items with a stored result in `folder` are skipped, unless `fresh`. identity: everything that
    the results depend on besides the task. Raises UsageError if the folder has results of
    another model or task, and ResourceError if it cannot be written.
    """
    path = folder / f"{file_name(task.name)}.jsonl"
    header = {**task.settings(), **identity}
    results = {} if fresh else _earlier_results(task, path, header)
    done = {name: result for name, result in results.items() if "error" not in result}
    before, started = len(done), time.perf_counter()
    with open_results(path, header, done.values()) as write:
        if fresh:  # the metrics of the earlier evaluation
            path.with_suffix(".json").unlink(missing_ok=True)
        progress(before, len(task))
        for result in task.run(model, done):
            write(result)
            results[result["id"]] = result
            progress(len(results), len(task))
    seconds = time.perf_counter() - started
    good = [result for result in results.values() if "error" not in result]
    summary = {
        "task": task.name,
        "model": model.name,
        **task.summary(good),
        **_error_metrics(list(results.values()), task),
        "seconds": seconds,
        "asked_now": len(results) - before,
        "settings": header,
    }
    if contamination:
        clean = [result for result in good if result["id"] not in contamination.found]
        summary["contamination"] = contamination.metrics() | {"without": task.summary(clean)}
    text = json.dumps(summary, ensure_ascii=False, indent=1) + "\n"
    write_atomically(path.with_suffix(".json"), text)
    if isinstance(task, MultipleChoice):
        _write_tables(path.with_suffix(""), task.tables(good))
    return summary


def _earlier_results(task: Task, path: Path, header: Mapping[str, Any]) -> dict[str, Result]:
    """Return the stored results of the task's items by id. Raises as `read_results`."""
    results = read_results(path, header)
    if not results:
        former = path.with_name(f"{file_name(task.kind)}.jsonl")
        with suppress(UsageError):  # of other data
            results = read_results(former, header)
    # Ids of documents contain paths: the same data may have been evaluated under another one.
    return {name: result for name, result in results.items() if name in task}


def file_name(text: str) -> str:
    """Convert a text to a file name that is valid on every file system."""
    name = re.sub(r"[^\w.-]+", "-", text).strip("-.") or "_"
    if len(name.encode()) <= _MAX_NAME:
        return name
    shortened = name.encode()[: _MAX_NAME - 9].decode(errors="ignore")
    return f"{shortened}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def read_results(
    path: Path,
    header: Mapping[str, Any],
    *,
    advice: str = "remove it to evaluate again, or choose another --out",
) -> dict[str, Result]:
    """Return the results in a file by id; of several with the same id, the last one counts.

    Returns an empty dict if there is no file. Raises UsageError, with the advice, if the file's
    header differs from `header`.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ResourceError(f"{path}: cannot be read: {error.strerror}") from error
    lines = content.split(b"\n")[:-1]  # a last line without a line break is incomplete
    if not lines:
        return {}
    stored = _parse_object(lines[0])
    if differing := sorted(key for key in {*stored, *header} if stored.get(key) != header.get(key)):
        raise UsageError(
            f"{path}: has results of another evaluation ({', '.join(differing)} differ); {advice}"
        )
    results = [result for line in lines[1:] if "id" in (result := _parse_object(line))]
    return {str(result["id"]): result for result in results}


def read_object(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file; empty if the file is missing or damaged."""
    try:
        return _parse_object(path.read_bytes())
    except OSError:
        return {}


def _parse_object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


@contextmanager
def open_results(
    path: Path, header: Mapping[str, Any], previous: Iterable[Result] = ()
) -> Iterator[Callable[[Result], None]]:
    """Write a file with the previous results, and yield a function that appends one."""
    lines = [header, *previous]
    try:
        write_atomically(path, "".join(map(_to_line, lines)))
        file = path.open("ab")
    except OSError as error:
        raise ResourceError(f"{path}: cannot be written: {error.strerror}") from error

    def write(value: Mapping[str, Any]) -> None:
        file.write(_to_line(value).encode("utf-8", "replace"))
        file.flush()

    with file:
        yield write


def _to_line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _error_metrics(results: Sequence[Result], task: Task) -> dict[str, Any]:
    """Count failed items and unreadable lines, with examples."""
    errors = {result["id"]: result["error"] for result in results if "error" in result}
    return {
        "failed": len(errors),
        "errors": dict(list(errors.items())[:10]),
        "unreadable": task.invalid.total,
        "first_unreadable": task.invalid.first,
    }


def _write_tables(folder: Path, tables: Mapping[str, list[dict[str, Any]]]) -> None:
    names = {f"{file_name(subject)}.csv": rows for subject, rows in tables.items()}
    for name, rows in names.items():
        columns = list(dict.fromkeys(column for row in rows for column in row))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
        # Excel recognizes UTF-8 by the byte order mark.
        write_atomically(folder / name, "\ufeff" + text.getvalue())
    for old in folder.glob("*.csv"):
        if old.name not in names:
            old.unlink()
