"""`metrics.jsonl`: every metric of a run, a JSON object per line; trackers get the same numbers."""

import contextlib
import json
import math
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from minimind.errors import ConfigError, ResourceError, install_line


class _Tracker(Protocol):
    def log(self, metrics: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class MetricsLog:
    """Append lines to `path`, and hand the numbers to trackers once they are started.

    A tracker that fails is dropped with a warning: training does not depend on it.
    Raises ConfigError for a tracker that is not installed.
    """

    def __init__(
        self,
        path: Path,
        *,
        trackers: Sequence[str] = (),
        name: str = "run",
        warn: Callable[[str], None] = print,
    ) -> None:
        for tracker in trackers:
            spec = find_spec(tracker)
            if spec is None or spec.origin is None:  # a folder of that name is no package
                raise ConfigError(
                    f"training.trackers: {tracker} is not installed; {install_line(tracker)}"
                )
        self._names, self._run_name, self._warn = trackers, name, warn
        self._trackers: dict[str, _Tracker] = {}
        self._path, self._stream = path, path.open("ab")

    def start_trackers(self, step: int) -> None:
        """Open the trackers for a run that stands at `step`: above 0 they continue their curves.

        What they hold of later steps is dropped, where the tracker can: it will come again.
        """
        for name in self._names:
            with self._failures_of(name):
                self._trackers[name] = _TRACKERS[name](self._path.parent, self._run_name, step)

    @contextlib.contextmanager
    def _failures_of(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a tracker raises: no login, no network, a full disk
            self._trackers.pop(name, None)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._warn(
                f"training.trackers: {name} has failed and gets no more metrics ({reason}). "
                f"Training continues; {self._path} holds every metric"
            )

    @property
    def offset(self) -> int:
        """Bytes written so far."""
        return self._stream.tell()

    def sync(self) -> None:
        """Wait until they are safe on the disk. Raises ResourceError if they cannot be."""
        with self._errors_as_ours():
            os.fsync(self._stream.fileno())

    @contextlib.contextmanager
    def _errors_as_ours(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ResourceError(
                f"{self._path}: cannot be written ({error}). Checkpoints are whole: free some "
                "space and give the same command again"
            ) from error

    def truncate(self, offset: int) -> None:
        """Forget what was written after `offset`: a resumed run writes it again."""
        if offset < self._stream.tell():  # a file that somebody has emptied is not filled up
            self._stream.truncate(offset)
            self._stream.seek(offset)

    def write(self, metrics: Mapping[str, Any], timing: Mapping[str, Any] | None = None) -> None:
        """Append one line: what the run's seed and data decide, then what the clock does.

        Numbers that are not finite become null: JSON has no others. Raises ResourceError.
        """
        line: dict[str, Any] = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in (dict(metrics) | dict(timing or {})).items()
        }
        text = json.dumps(line, ensure_ascii=False, allow_nan=False)
        with self._errors_as_ours():
            self._stream.write(text.encode() + b"\n")
            self._stream.flush()
        numbers = {
            f"{line['kind']}/{key}": float(value)
            for key, value in line.items()
            if isinstance(value, int | float) and key != "step"
        }
        for name, tracker in list(self._trackers.items()) if numbers else ():
            with self._failures_of(name):
                tracker.log(numbers, int(line["step"]))

    def close(self) -> None:
        """Close the file and the trackers."""
        with contextlib.suppress(OSError):  # of a line that could not be written; that was raised
            self._stream.close()
        for name, tracker in list(self._trackers.items()):
            with self._failures_of(name):
                tracker.close()


class _TensorBoard:
    def __init__(self, run: Path, name: str, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Step 0 has metrics of its own, of the validation before the first step.
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
    """Return the tracker's id of the run; one that begins at step 0 gets a new one."""
    file = run / f"{tracker}-run-id"
    if step and file.is_file():
        return file.read_text("ascii").strip()
    run_id = uuid.uuid4().hex[:21]  # SwanLab takes 21 characters
    file.write_text(run_id + "\n", "ascii")
    return run_id
