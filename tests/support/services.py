"""Services for tests: in a child process, or in a thread of the test process."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx2 as httpx
import psutil
import torch

from minimind.model import PRESETS, ModelConfig, Transformer, save_model
from minimind.serving.limits import Limits
from minimind.serving.models import find_models, load_models
from minimind.serving.server import Server, bind, url_of
from minimind.tokenizer import Tokenizer
from tests.support.commands import fast_python


def make_model(tokenizer: Tokenizer, seed: int, context: int, padding: int = 0) -> Transformer:
    """Create a random model with varied answers that never ends them.

    padding: embedding rows beyond the vocabulary; the model gives them the highest probability.
    """
    torch.manual_seed(seed)
    rows = tokenizer.vocab_size + padding
    shape = {"vocab_size": rows, "max_position_embeddings": context}
    model = Transformer(ModelConfig(**PRESETS["nano"] | shape))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                parameter.mul_(60 if writes else 6)
        model.head_weight[[tokenizer.im_end, tokenizer.end_of_text]] = 0
        model.head_weight[tokenizer.vocab_size :] *= 3
    return model


def save_models(folder: Path, tokenizer: Tokenizer, context: int = 2048) -> Path:
    """Save two runs, `tiny` and `other`, in `folder`."""
    for name, seed in (("tiny", 1), ("other", 2)):
        save_model(folder / name / "model", make_model(tokenizer, seed, context), tokenizer)
    return folder


@dataclass
class Process:
    """A service in a child process."""

    url: str
    child: subprocess.Popen[str]
    log: Path

    @property
    def pid(self) -> int:
        """The process that listens; `child` only stands for it."""
        port = int(self.url.rpartition(":")[2])
        return next(
            connection.pid
            for connection in psutil.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
        )

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit status."""
        self.child.send_signal(number)
        return self.child.wait(timeout=120)


@contextlib.contextmanager
def serving(folder: Path, log: Path, *flags: str, **variables: str) -> Iterator[Process]:
    """Run `minimind serve` on a free port."""
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [*fast_python(), "-m", "minimind", "serve", str(folder), "--port", "0", *flags],
            stdout=subprocess.PIPE,
            stderr=errors,
            stdin=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"} | variables,
        ) as child,
    ):
        try:
            assert child.stdout
            line = child.stdout.readline()
            assert line, log.read_text()
            url = line.split()[-1].removesuffix("/v1")
            wait_until(lambda: is_up(url))
            yield Process(url, child, log)
        finally:
            child.kill()


def is_up(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/health").status_code == 200
    return False


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Poll until the condition holds; fail after a generous timeout."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timeout"
        time.sleep(0.02)


class InProcess:
    """A service in a thread of this process, with custom limits."""

    def __init__(self, folder: Path, slots: int, limits: Limits, keys: Sequence[str]) -> None:
        self.models = load_models(
            find_models([folder]), device="cpu", slots=slots, max_queued=limits.queue
        )
        listening = bind("127.0.0.1", 0)
        self.url = url_of(listening)
        self.address = listening[0].getsockname()
        self.server = Server(self.models, keys=keys, limits=limits)
        self._thread = threading.Thread(target=self.server.serve_at, args=(listening,))

    def __enter__(self) -> "InProcess":
        self._thread.start()
        wait_until(lambda: self.server.started)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self._thread.join(timeout=120)
        assert not self._thread.is_alive()
