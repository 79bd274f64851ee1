"""`metrics.jsonl`: the metrics of a run, one JSON object per line. Trackers log them too."""

import contextlib
import json
import math
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from minimind.errors import ConfigError, ResourceError, install_line, same_command


def check_trackers(trackers: Sequence[str]) -> None:
    """Raise ConfigError for a tracker that is not installed."""
    for tracker in trackers:
        spec = find_spec(tracker)
        if spec is None or spec.origin is None:  # a folder of that name is not a package
            raise ConfigError(
                f"training.trackers: {tracker} is not installed; {install_line(tracker)}"
            )


class _Tracker(Protocol):
    """The interface to an experiment tracker."""

    def log(self, metrics: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class MetricsLog:
    """Appends lines to a file, and logs their numbers to trackers after `start_trackers`.

    A tracker that fails is dropped with a warning, and training continues.
    """

    def __init__(
        self,
        path: Path,
        *,
        trackers: Sequence[str] = (),
        name: str = "run",
        warn: Callable[[str], None] = print,
    ) -> None:
        """Open `path` for appending. The trackers must be installed (`check_trackers`)."""
        self._names, self._run_name, self._warn = trackers, name, warn
        self._trackers: dict[str, _Tracker] = {}
        self._path, self._stream = path, path.open("ab")

    def start_trackers(self, step: int) -> None:
        """Open the trackers of a run that has done `step` steps; a resumed run keeps its curves.

        Where the tracker can, it drops the metrics of later steps, which will be logged again.
        """
        for name in self._names:
            with self._drop_if_failing(name):
                self._trackers[name] = _TRACKERS[name](self._path.parent, self._run_name, step)

    @contextlib.contextmanager
    def _drop_if_failing(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # any: no login, no network, a full disk
            self._trackers.pop(name, None)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._warn(
                f"training.trackers: {name} failed and will receive no more metrics ({reason}). "
                f"Training continues; {self._path} contains all metrics"
            )

    @property
    def offset(self) -> int:
        """Number of bytes written so far."""
        return self._stream.tell()

    def sync(self) -> None:
        """Flush the file to the disk. Raises ResourceError if that fails."""
        with self._write_errors():
            os.fsync(self._stream.fileno())

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ResourceError(
                f"{self._path}: cannot be written ({error}). The checkpoints are intact: free some "
                f"space and run {same_command()} again to resume"
            ) from error

    def truncate(self, offset: int) -> None:
        """Remove the lines after `offset` bytes, which a resumed run will write again."""
        if offset < self._stream.tell():  # never extend a file that was emptied by the user
            self._stream.truncate(offset)
            self._stream.seek(offset)

    def write(self, metrics: Mapping[str, Any], timing: Mapping[str, Any] | None = None) -> None:
        """Append a line of reproducible metrics, followed by those that depend on the clock.

        Numbers that are not finite become null, since JSON cannot represent them. Raises
        ResourceError if the file cannot be written.
        """
        line: dict[str, Any] = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in (dict(metrics) | dict(timing or {})).items()
        }
        text = json.dumps(line, ensure_ascii=False, allow_nan=False)
        with self._write_errors():
            self._stream.write(text.encode() + b"\n")
            self._stream.flush()
        numbers = {
            f"{line['kind']}/{key}": float(value)
            for key, value in line.items()
            if isinstance(value, int | float) and key != "step"
        }
        for name, tracker in list(self._trackers.items()) if numbers else ():
            with self._drop_if_failing(name):
                tracker.log(numbers, int(line["step"]))

    def close(self) -> None:
        """Close the file and the trackers."""
        with contextlib.suppress(OSError):  # of a failed write, which was raised then
            self._stream.close()
        for name, tracker in list(self._trackers.items()):
            with self._drop_if_failing(name):
                tracker.close()


class _TensorBoard:
    def __init__(self, run: Path, name: str, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Step 0 has metrics too, from the validation before the first step.
        self._writer = SummaryWriter(run / "tensorboard", purge_step=step + 1 if step else 0)

    def log(self, metrics: dict[str, float], step: int) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, run: Path, name: str, step: int) -> None:
        import wandb

        self._run = wandb.init(
            project="minimind", name=name, dir=run, id=_run_id(run, "wandb", step), resume="allow"
        )

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._run.log(metrics, step=step)

    def close(self) -> None:
        self._run.finish()


class _SwanLab:
    def __init__(self, run: Path, name: str, step: int) -> None:
        import swanlab

        self._swanlab = swanlab
        swanlab.init(
            project="minimind",
            experiment_name=name,
            logdir=str(run / "swanlab"),
            id=_run_id(run, "swanlab", step),
            resume="allow",
        )

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._swanlab.log(metrics, step=step)

    def close(self) -> None:
        self._swanlab.finish()


_TRACKERS: dict[str, Callable[[Path, str, int], _Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "swanlab": _SwanLab,
}


def _run_id(run: Path, tracker: str, step: int) -> str:
    """Return the run's id in the tracker; a run that starts at step 0 gets a new one."""
    file = run / f"{tracker}-run-id"
    if step and file.is_file():
        return file.read_text("ascii").strip()
    run_id = uuid.uuid4().hex[:21]  # SwanLab allows 21 characters
    file.write_text(run_id + "\n", "ascii")
    return run_id
