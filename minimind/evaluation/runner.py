"""Tasks put to models: results written as they come, so that a stopped evaluation goes on.

<folder>/<task>.jsonl   a header that says of what model and questions, then a result a line
<folder>/<task>.json    the figures, once all is done
<folder>/<task>/…csv    for multiple choice, a table a subject
"""

import csv
import io
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minimind.errors import ResourceError, UsageError
from minimind.evaluation.contamination import Contamination
from minimind.evaluation.multiple_choice import MultipleChoice
from minimind.evaluation.tasks import Model, Result, Task
from minimind.files import write_atomically

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
    with writing(path, header, results.values()) as write:
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
        summary["contamination"] = contamination.metrics() | {"without": task.summary(without)}
    text = json.dumps(summary, ensure_ascii=False, indent=1) + "\n"
    write_atomically(path.with_suffix(".json"), text)
    if isinstance(task, MultipleChoice):
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


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one where there is none or it is damaged."""
    try:
        return _object(path.read_bytes())
    except OSError:
        return {}


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


@contextmanager
def writing(
    path: Path, header: Mapping[str, Any], kept: Iterable[Result] = ()
) -> Iterator[Callable[[Result], None]]:
    """Write a file of results anew with those that are kept; yield a function that adds a line.

    An item has one line: errors are left out here, for their items are tried again.
    """
    lines = [header, *(result for result in kept if "error" not in result)]
    try:
        write_atomically(path, "".join(map(_line, lines)))
        file = path.open("ab")
    except OSError as error:
        raise ResourceError(f"{path}: cannot be written: {error.strerror}") from error

    def write(value: Mapping[str, Any]) -> None:
        file.write(_line(value).encode("utf-8", "replace"))
        file.flush()

    with file:
        yield write


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _faults(results: Sequence[Result], task: Task) -> dict[str, Any]:
    """What went wrong: how many, and the first few of each."""
    errors = {result["id"]: result["error"] for result in results if "error" in result}
    return {
        "failed": len(errors),
        "errors": dict(list(errors.items())[:10]),
        "unreadable": task.bad.total,
        "first_unreadable": task.bad.first,
    }


def _write_tables(folder: Path, tables: Mapping[str, list[dict[str, Any]]]) -> None:
    names = {f"{file_name(subject)}.csv": rows for subject, rows in tables.items()}
    for name, rows in names.items():
        columns = list(dict.fromkeys(column for row in rows for column in row))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(folder / name, "\ufeff" + text.getvalue())  # the mark that Excel wants
    for old in folder.glob("*.csv"):
        if old.name not in names:
            old.unlink()
