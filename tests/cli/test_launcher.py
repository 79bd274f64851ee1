"""Data-parallel processes of the real command: killed, stopped, orphaned, on two nodes."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.commands import fast_python, with_fast_children

INTERRUPTED = 130
TEXT = "第{0}段长{1}公里，最后流入东海。Part {0} of the river is {1} kilometres long. " * 3


@pytest.fixture(scope="module")
def training(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of a long run of the smallest model, without a run directory."""
    folder = tmp_path_factory.mktemp("workers")
    texts = (json.dumps({"text": TEXT.format(n, 7 * n)}, ensure_ascii=False) for n in range(200))
    (folder / "text.jsonl").write_text("\n".join(texts), encoding="utf-8")
    settings = {
        "model.preset": "nano",
        "data.seq_len": 32,
        "data.store": folder / "stores",
        "training.global_batch_size": 4,
        "training.micro_batch_size": 1,
        "training.precision": "fp32",
        "training.steps": 100_000,
        "training.log_every": 1,
        "checkpoint.every": 7,
        "schedule.warmup": 0,
    }
    flags = ["--data", folder / "text.jsonl", "--tokenizer", tokenizer_dir, "--device", "cpu"]
    given = [f"{key}={value}" for key, value in settings.items()]
    return ["-m", "minimind", "pretrain", *map(str, flags), *given]


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start Python processes, which are killed with their children after the test.

    torchrun and all training processes have imported torch already, except with `imports`.
    """
    fast = with_fast_children(tmp_path)
    variables = {"OMP_NUM_THREADS": "1", "PYTHON_EXEC": fast[-1]}  # the executable of torchrun
    with contextlib.ExitStack() as stack:

        def begin(
            *arguments: str, module: str = "", imports: bool = False
        ) -> subprocess.Popen[str]:
            started = [*fast, *arguments]
            if module:
                started = [*fast_python(), "-m", module, *arguments]
            elif imports:
                started = [sys.executable, *arguments]
            process = stack.enter_context(
                subprocess.Popen(
                    started,
                    env=os.environ | variables,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            stack.callback(end, process)
            return process

        yield begin


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    for worker in workers(process).values():
        worker.kill()


def wait_for_steps(run: Path, steps: int, process: subprocess.Popen[str]) -> int:
    """Wait until the run has logged `steps` more steps; return their total."""

    def done() -> int:
        path = run / "metrics.jsonl"
        return path.read_bytes().count(b'"kind": "train"') if path.exists() else 0

    wanted = done() + steps
    while done() < wanted:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    return done()


def workers(process: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """Return the training processes by rank; they have the same arguments after --out."""
    assert isinstance(process.args, list)
    ends = process.args[process.args.index("--out") :]
    found = {}
    for candidate in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if candidate.cmdline()[-len(ends) :] == ends and "RANK" in candidate.environ():
                found[int(candidate.environ()["RANK"])] = candidate
    return found


def test_a_killed_process_ends_the_others_and_the_run_resumes(
    training: list[str], start: Start, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = [*training, "--out", str(run), "--nproc", "2"]
    for victim in (1, 0):
        process = start(*command)
        wait_for_steps(run, 10, process)
        both = workers(process)
        both[victim].kill()
        said, complaint = process.communicate(timeout=60)  # it takes a second
        assert process.returncode == 1
        assert complaint == (
            f"error: process {victim} of 0-1 was ended by SIGKILL (often because memory ran out); "
            "the others were stopped. Run the same command again to resume from the last "
            "checkpoint\n"
        )
        assert ("resuming from step" in said) == (victim == 0)
        assert not any(worker.is_running() for worker in both.values())
    process = start(*training, "--out", str(run))  # and so does one process alone
    wait_for_steps(run, 5, process)
    process.send_signal(signal.SIGTERM)
    said, complaint = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED, complaint
    assert "resuming from step" in said


def test_orphaned_stopped_and_killed(training: list[str], start: Start, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [*training, "--out", str(run), "--nproc", "2"]
    process = start(*command)
    wait_for_steps(run, 10, process)
    both = workers(process)
    process.kill()
    psutil.wait_procs(both.values())  # fails by pytest's time limit if they keep running

    process = start(*command)
    wait_for_steps(run, 10, process)
    process.send_signal(signal.SIGINT)
    said, complaint = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED, complaint
    assert said.count("stopped after step") == 1 and complaint == ""
    saved = sorted(path.name for path in (run / "checkpoints").iterdir())
    last = (run / "metrics.jsonl").read_text().splitlines()[-1]
    assert int(saved[-1].removeprefix("step-")) == json.loads(last)["step"]

    process = start(*command)
    wait_for_steps(run, 3, process)
    both = workers(process)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED
    assert not any(worker.is_running() for worker in both.values())


def test_an_error_is_printed_once(training: list[str], start: Start, tmp_path: Path) -> None:
    odd = "training.global_batch_size=3"
    command = [*training, odd, "--out", str(tmp_path / "run"), "--nproc", "2"]
    process = start(*command, imports=True)
    _, complaint = process.communicate()
    assert process.returncode == 1
    assert complaint == (
        "error: training.global_batch_size=3 is not divisible by 2 processes; choose a multiple, "
        "or another number of processes\n"
    )


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_two_machines_by_torchrun(training: list[str], start: Start, tmp_path: Path) -> None:
    """Two nodes on this machine, with one process and one folder each; one of them is killed."""

    def nodes(*options: list[str]) -> list[subprocess.Popen[str]]:
        return [
            start(
                *("--nnodes", "2", "--nproc-per-node", "1", *own),
                *(*training, "--out", str(tmp_path / f"{number}")),
                module="torch.distributed.run",
            )
            for number, own in enumerate(options)
        ]

    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    both = nodes(meeting, meeting)
    runs = [tmp_path / "0", tmp_path / "1"]
    while not any((run / "checkpoints" / "step-00000007").is_dir() for run in runs):
        assert all(node.poll() is None for node in both), [node.communicate() for node in both]
        time.sleep(0.02)
    ranks = [workers(node) for node in both]
    assert sorted(rank for of in ranks for rank in of) == [0, 1]
    [other] = [of[0] for of in ranks if 0 in of]
    [lost] = [of[1] for of in ranks if 1 in of]
    lost.kill()
    ends = [node.communicate(timeout=100) for node in both]
    assert all(node.returncode == 1 for node in both)
    assert sum("SIGKILL" in complaint for _, complaint in ends) == 1  # reported by its own node
    assert not other.is_running()

    # The run is on the node of rank 0. Another rank 0 does not start it again.
    first = 0 if 0 in ranks[0] else 1
    assert not (runs[1 - first] / "metrics.jsonl").exists()
    meeting = ["--master-addr", "127.0.0.1", "--master-port", str(free_port()), "--node-rank"]
    both = nodes([*meeting, str(1 - first)], [*meeting, str(first)])
    _, complaint = both[first].communicate(timeout=100)
    assert (
        f"error: {runs[first]} exists on " in complaint
        and "but not on the machine of process 0" in complaint
    )


@pytest.mark.parametrize("signalled", ["training process", "torchrun"])
def test_stopping_under_torchrun_is_no_failure(
    training: list[str], start: Start, tmp_path: Path, signalled: str
) -> None:
    """All processes save and exit with 0; torchrun itself exits with an error on a signal."""
    run = tmp_path / "run"
    options = ["--standalone", "--nproc-per-node", "2"]
    process = start(*options, *training, "--out", str(run), module="torch.distributed.run")
    wait_for_steps(run, 10, process)
    both = workers(process)
    if signalled == "torchrun":
        process.send_signal(signal.SIGTERM)
    else:
        both[1].send_signal(signal.SIGTERM)
    said, complaint = process.communicate(timeout=60)
    assert said.count("stopped after step") == 1
    saved = sorted(path.name for path in (run / "checkpoints").iterdir())
    last = (run / "metrics.jsonl").read_text().splitlines()[-1]
    assert int(saved[-1].removeprefix("step-")) == json.loads(last)["step"]
    if signalled == "torchrun":
        assert "SignalException" in complaint and "ChildFailedError" not in complaint
    else:
        assert process.returncode == 0, complaint
