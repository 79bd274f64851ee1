"""A Python that starts in milliseconds, because it has imported torch and the package.

A server imports them once per test process, and forks for each command. The test starts a client,
a small process that stands for the command: it hands its arguments, environment, folder and
standard streams to the server, forwards signals, and ends with the status of the command.

Tests of imports and of terminals run `sys.executable` instead, and so do tests that look for the
children of a command: those of the client are none. A test that kills a command, and then reads its
files, needs its process id; see `pid_of`.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import marshal
import os
import random
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

_PYTHON = sys.executable
# What commands import. `minimind.cli` is not here: its console reads the environment.
_MODULES = (
    "numpy.ctypeslib",
    "numpy.ma",
    "rich.progress",
    "torch._dynamo",  # by optimizers
    "torch.utils.serialization.config",
    "typer",
    "minimind.training.stage",
    "minimind.inference.engine",
    "minimind.serving.models",
    "minimind.serving.server",
    "minimind.web.client",
    "streamlit.web.cli",
)
PID_FILE = "MINIMIND_TEST_PID_FILE"  # variable with the file that receives the command's process id
# It imports no module that is written in Python, so it starts in a few milliseconds.
_CLIENT = """
import _socket, marshal, posix, sys, _signal
server = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
server.connect(sys.argv[1])
streams = b"".join(stream.to_bytes(4, sys.byteorder) for stream in (0, 1, 2))
request = marshal.dumps((sys.argv[2:], posix.environ, posix.getcwd()))
rights = (_socket.SOL_SOCKET, _socket.SCM_RIGHTS, streams)
server.sendmsg([request], [rights])
for number in (_signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP):
    _signal.signal(number, lambda number, _: server.send(bytes([number])))
status = int(server.recv(20))
if status < 0:
    _signal.signal(-status, _signal.SIG_DFL)
    posix.kill(posix.getpid(), -status)
posix._exit(status)
"""

_WITH_EXECUTABLE = """
import runpy, sys
sys.executable = sys.argv[1]
sys.argv = sys.argv[3:]  # without "-m"
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def fast_python() -> list[str]:
    """Return the start of a command line that continues with `-m MODULE …` or `-c CODE …`."""
    if sys.platform != "linux":
        return [_PYTHON]
    return [_PYTHON, "-I", "-S", "-c", _CLIENT, _server()]


def fast_executable(folder: Path) -> str:
    """Write a script that starts `fast_python`; return its path.

    It can replace `sys.executable` in programs that start Python processes themselves.
    """
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nexec {shlex.join(fast_python())} "$@"\n', encoding="utf-8")
    script.chmod(0o700)
    return str(script)


def with_fast_children(folder: Path) -> list[str]:
    """Return the start of a command line, as `fast_python` does, of a real process.

    The Python processes that it starts are fast. `folder` receives a script.
    """
    return [_PYTHON, "-c", _WITH_EXECUTABLE, fast_executable(folder)]


def pid_of(child: subprocess.Popen[Any], file: Path) -> int:
    """Return the process id of a command that was started with `PID_FILE` and has begun to work."""
    return int(file.read_text()) if file.exists() else child.pid  # elsewhere `child` is the command


@functools.cache
def _server() -> str:
    """Start the server; return the path of its socket."""
    folder = tempfile.mkdtemp()
    path = f"{folder}/socket"
    process = subprocess.Popen(
        [_PYTHON, "-m", "tests.support.commands", path],
        stdin=subprocess.PIPE,  # it ends with this process
        stdout=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"},
        start_new_session=True,
    )
    assert process.stdout and process.stdout.readline() == b"ready\n"

    def end() -> None:
        process.communicate()
        Path(path).unlink()
        Path(folder).rmdir()

    atexit.register(end)
    return path


def _serve(path: str) -> None:
    """Fork for each client until stdin is closed; return in the process of a command."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen(64)
        os.write(1, b"ready\n")
        while listener in select.select([listener, sys.stdin], [], [])[0]:
            client, _ = listener.accept()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:  # processes that have watched a command
                    pass
            with client:
                if os.fork() == 0:
                    listener.close()
                    return _start(client)
    sys.exit()


def _start(client: socket.socket) -> None:
    """Fork again, and watch the command; return in its process."""
    request, streams, _, _ = socket.recv_fds(client, 1 << 20, 3)
    pid = os.fork()
    if pid:
        for stream in (0, 1, 2, *streams):  # so that readers see when the command has closed them
            os.close(stream)
        _watch(client, pid)
    client.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    arguments, environment, folder = marshal.loads(request)
    os.environ.clear()
    os.environb.update(environment)
    os.chdir(folder)
    if file := os.environ.pop(PID_FILE, ""):
        Path(file).write_text(str(os.getpid()))
    encoding = os.environ.get("PYTHONIOENCODING", "utf-8")
    sys.stdin = open(0, encoding=encoding, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding=encoding, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, encoding, "backslashreplace", closefd=False)  # noqa: SIM115
    random.seed()
    sys.argv = arguments


def _watch(client: socket.socket, pid: int) -> NoReturn:
    """Forward signals to the command; report its status, or kill it when the client has gone."""
    ended = os.pidfd_open(pid)
    while ended not in (ready := select.select([client, ended], [], [])[0]):
        assert client in ready
        numbers = client.recv(1)
        os.kill(pid, numbers[0] if numbers else signal.SIGKILL)
        if not numbers:
            os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    client.send(str(status).encode())
    os._exit(0)


def _run() -> None:
    """Do what Python does with `-m MODULE …` or `-c CODE …`, after `-u` or `-P` or not."""
    if sys.argv[0] == "-u":  # from torchrun
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
        del sys.argv[0]
    if sys.argv[0] == "-P":  # the server's own path is in force anyway
        del sys.argv[0]
    kind, program, *arguments = sys.argv
    sys.argv = [kind, *arguments]
    if kind == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})


def exit_after(function: Callable[[], object]) -> NoReturn:
    """End a forked process as the interpreter does, without the time to free all modules."""
    status = 1
    try:
        function()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    import torch

    for module in _MODULES:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # a collection would copy all pages of the modules into each process
    _serve(sys.argv[1])
    exit_after(_run)
