"""`metrics.jsonl`: every figure of a run, a JSON object a line, and trackers fed with the same."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from minimind.errors import ConfigError, ResourceError, install_line

# (figures, step): hands figures to a tracker; and what closes it.
_Tracker = tuple[Callable[[dict[str, float], int], None], Callable[[], None]]


class MetricsLog:
    """Appends lines to `path`; numbers go on to the trackers, if any are asked for.

    Raises ConfigError for a tracker that is not installed.
    """

    def __init__(self, path: Path, *, trackers: Sequence[str] = (), name: str = "run") -> None:
        self._trackers = [_open_tracker(tracker, path.parent, name) for tracker in trackers]
        self._path, self._stream = path, path.open("ab")

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

    def write(self, figures: Mapping[str, Any], timing: Mapping[str, Any] | None = None) -> None:
        """Append one line: what the run's seed and data decide, then what the clock does.

        Numbers that are not finite become null: JSON has no others. Raises ResourceError.
        """
        line: dict[str, Any] = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in (dict(figures) | dict(timing or {})).items()
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
        for log, _ in self._trackers if numbers else ():
            log(numbers, int(line["step"]))

    def close(self) -> None:
        """Close the file and the trackers."""
        with contextlib.suppress(OSError):  # of a line that could not be written; that was raised
            self._stream.close()
        for _, close in self._trackers:
            close()


def _open_tracker(tracker: str, run: Path, name: str) -> _Tracker:
    try:
        return {"tensorboard": _tensorboard, "wandb": _wandb, "swanlab": _swanlab}[tracker](
            run, name
        )
    except ImportError:
        raise ConfigError(
            f"training.trackers: {tracker} is not installed; {install_line(tracker)}"
        ) from None


def _tensorboard(run: Path, name: str) -> _Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(run / "tensorboard")

    def log(figures: dict[str, float], step: int) -> None:
        for key, value in figures.items():
            writer.add_scalar(key, value, step)

    return log, writer.close


def _wandb(run: Path, name: str) -> _Tracker:
    import wandb

    tracked = wandb.init(project="minimind", name=name, dir=run)
    return lambda figures, step: tracked.log(figures, step=step), tracked.finish


def _swanlab(run: Path, name: str) -> _Tracker:
    import swanlab

    swanlab.init(project="minimind", experiment_name=name, logdir=str(run / "swanlab"))
    return lambda figures, step: swanlab.log(figures, step=step), swanlab.finish
