"""The thread that runs the engines of this process."""

import os
import sys
import threading
from typing import Protocol

import torch

_NICENESS = 5  # measured in benchmarks/records/service-reliability.md


class Steppable(Protocol):
    """An engine, as its thread sees it."""

    def has_work(self) -> bool:
        """Return True when a step would do anything. Called with `changed` held."""

    def step(self) -> bool:
        """Run one step; return False when the engine has closed or failed."""


class EngineThread:
    """One thread for all engines: each step runs every engine that has work once.

    OpenMP keeps a thread pool per calling thread, and two pools on the same cores slow each other
    down; see `load.single_threaded`.

    changed: guards the state that engines share with other threads; notified of new work.
    thread: None while there are no engines.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.thread: threading.Thread | None = None
        self._engines: list[Steppable] = []

    def add(self, engine: Steppable) -> None:
        """Run an engine until its step returns False."""
        with self.changed:
            self._engines.append(engine)
            if self.thread is None:
                self.thread = threading.Thread(
                    target=self._run, name="minimind-engine", daemon=True
                )
                self.thread.start()

    @torch.inference_mode()
    def _run(self) -> None:
        while ready := self._wait_for_work():
            ended = [engine for engine in ready if not engine.step()]
            with self.changed:
                self._engines = [engine for engine in self._engines if engine not in ended]
            del ready, ended  # their memory is free while the thread waits

    def _wait_for_work(self) -> list[Steppable]:
        """Wait for engines with work; return an empty list when no engine is left."""
        with self.changed:
            while not (ready := [engine for engine in self._engines if engine.has_work()]):
                if not self._engines:
                    self.thread = None
                    break
                self.changed.wait()
            return ready


ENGINE_THREAD = EngineThread()


def lower_thread_priority() -> None:
    """Let other threads run before the engine's thread. Linux only.

    Call it after an engine was created and before its first step: the threads of an OpenMP pool
    inherit the niceness that their caller has when the pool starts.
    """
    thread = ENGINE_THREAD.thread
    if sys.platform == "linux" and thread is not None and thread.native_id:
        own = os.getpriority(os.PRIO_PROCESS, thread.native_id)  # such as that of `nice minimind`
        os.setpriority(os.PRIO_PROCESS, thread.native_id, min(own + _NICENESS, 19))
