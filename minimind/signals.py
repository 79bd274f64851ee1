"""Requests to stop (Ctrl-C, SIGTERM, a closed terminal) are counted; end of the parent process."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType


@dataclass
class Interrupts:
    """Number of signals received so far."""

    count: int = 0


@contextlib.contextmanager
def count_interrupts(
    on_interrupt: Callable[[int], None] = lambda count: None,
) -> Iterator[Interrupts]:
    """Count requests to stop inside the block, and restore the previous handlers after it.

    They are SIGINT, SIGTERM and, unless `nohup` or the program handles it, SIGHUP of a closed
    terminal.
    `on_interrupt` runs in the signal handler with the new count; an exception that it raises
    interrupts the main thread. Only the main thread can install handlers: in any other thread the
    count stays 0, and the caller's own handlers stay in force.
    """
    interrupts = Interrupts()

    def handle(number: int, frame: FrameType | None) -> None:
        interrupts.count += 1
        on_interrupt(interrupts.count)

    stops = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        stops.append(signal.SIGHUP)
    try:
        previous = {number: signal.signal(number, handle) for number in stops}
    except ValueError:  # not the main thread
        previous = {}
    try:
        yield interrupts
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def raise_on_second(count: int) -> None:
    """Raise KeyboardInterrupt from the second signal on: a callback for `count_interrupts`."""
    if count > 1:
        raise KeyboardInterrupt


def exit_when_stdin_closes(*, gracefully: bool = False) -> None:
    """End this process as soon as its parent, which holds the other end of stdin, has ended.

    gracefully: send SIGTERM to this process, whose handlers then run; otherwise exit at once.
    """

    def watch() -> None:
        with contextlib.suppress(OSError):
            # Not sys.stdin, whose lock would block the interpreter's shutdown.
            while os.read(0, 4096):
                pass
        if gracefully:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            os._exit(1)

    threading.Thread(target=watch, name="stdin", daemon=True).start()
