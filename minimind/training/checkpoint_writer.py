"""Save checkpoints in the background: training waits only for a copy of the tensors."""

import contextlib
import copy
import threading
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from minimind.errors import ResourceError
from minimind.training.checkpoint import save_checkpoint


class CheckpointWriter:
    """Writer of the checkpoints of a run, one at a time, in a background thread.

    A failed write raises its ResourceError in the caller, at the next `check`, `save` or `wait`.
    """

    def __init__(self, run: Path, *, keep: int) -> None:
        self._run, self._keep = run, keep
        self._buffers: dict[str, Tensor] = {}  # host copies, reused by every save
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self,
        step: int,
        *,
        model: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        state: Mapping[str, Any],
        best: int | None = None,
        protect: Collection[int] = (),
        before_write: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy tensors and state, then write them in the background with `save_checkpoint`.

        before_write: called in the background thread before the first write.
        """
        self.wait()
        write_copies = partial(
            save_checkpoint,
            self._run,
            step,
            model={name: self._copy_to_host(f"model/{name}", t) for name, t in model.items()},
            optimizer={
                name: self._copy_to_host(f"optimizer/{name}", t) for name, t in optimizer.items()
            },
            state=copy.deepcopy(dict(state)),
            keep=self._keep,
            best=best,
            protect=protect,
        )

        def write() -> None:
            try:
                before_write()
                write_copies()
            except BaseException as error:
                self._error = error

        # A daemon thread, so that a second Ctrl-C exits without waiting for the disk.
        self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()

    def _copy_to_host(self, name: str, tensor: Tensor) -> Tensor:
        # Allocating memory takes longer than the copy itself, so buffers are reused.
        if name not in self._buffers:
            self._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
        return self._buffers[name].copy_(tensor.detach())

    def check(self) -> None:
        """Raise the error of a finished write. Does not wait for a running one."""
        if self._thread and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait for the running write. Raises its error."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._error:
            error, self._error = self._error, None
            raise error

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Wait for the running write, except after KeyboardInterrupt.

        The exception that left the block is not replaced by an error of the write, unless it is a
        ResourceError: the disk is full then, and the write's error says how much space is needed.
        """
        if kind is None or issubclass(kind, ResourceError):
            self.wait()
        elif not issubclass(kind, KeyboardInterrupt):
            with contextlib.suppress(ResourceError):
                self.wait()
