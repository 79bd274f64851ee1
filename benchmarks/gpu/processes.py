"""Two data-parallel processes on one GPU: NCCL where it allows that, else gloo.

    python -m benchmarks.gpu.processes BACKEND DEVICE TINY

is one process; the environment holds RANK and the like. Rank 0 prints its metrics as JSON.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.context import Context

_LIMIT_S = 30
# NCCL refuses two ranks on one device, unless a recent version has this set.
_SHARED_DEVICE = {"NCCL_MULTI_RANK_GPU_ENABLE": "1"}


def run(context: Context) -> None:
    """Start the processes with every backend, and record what each does or why it refuses."""
    attempts: dict[str, tuple[str, int, dict[str, str]]] = {"gloo, 2 processes": ("gloo", 2, {})}
    if context.device == "cuda":
        attempts = {
            "NCCL, 1 process": ("nccl", 1, {}),
            "NCCL, 2 processes": ("nccl", 2, {}),
            "NCCL, 2 processes, shared device allowed": ("nccl", 2, _SHARED_DEVICE),
        } | attempts
    for name, (backend, size, variables) in attempts.items():
        context.measure(name, lambda b=backend, n=size, v=variables: start(context, b, n, v))


def start(context: Context, backend: str, size: int, variables: dict[str, str]) -> dict[str, Any]:
    """Start `size` processes and return the metrics of rank 0; raise RuntimeError if one fails."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    shared = os.environ | variables
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    command = [sys.executable, "-m", "benchmarks.gpu.processes", backend, context.device]
    command.append(str(int(context.tiny)))
    logs = [context.work / f"{backend}-{rank}.log" for rank in range(size)]
    children = []
    for rank, log in enumerate(logs):
        environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with log.open("w") as stream:
            child = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream)
        children.append(child)
    deadline = time.monotonic() + _LIMIT_S * (4 if context.device == "cpu" else 1)
    try:
        while any(child.poll() is None for child in children):
            if time.monotonic() > deadline or any(child.poll() for child in children):
                break
            time.sleep(0.1)
        time.sleep(0.5)  # the others report the failure of the first
    finally:
        for child in children:
            child.kill()
        statuses = [child.wait() for child in children]
    if any(statuses):
        tails = "\n".join(log.read_text(errors="replace")[-1500:] for log in logs)
        raise RuntimeError(f"exit statuses {statuses}: {tails[-2500:]}")
    result: dict[str, Any] = json.loads(logs[0].read_text().splitlines()[-1])
    return result


def worker(backend: str, device_name: str, tiny: bool) -> dict[str, Any] | None:
    """Sum tensors over the processes, then train; return the metrics on rank 0."""
    import torch
    import torch.distributed as dist

    from benchmarks.gpu.training import TINY_CASES, Case, build
    from minimind.training.distributed import ProcessGroup

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device(device_name, 0) if device_name == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend)
    cpu_group = dist.new_group(backend="gloo")
    group = ProcessGroup(rank, size, rank, size, cpu_group)
    numbers = torch.full(((1 << 10) if tiny else (1 << 26),), float(rank + 1), device=device)
    dist.all_reduce(numbers)
    assert float(numbers[-1]) == sum(range(1, size + 1))
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        dist.all_reduce(numbers)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    case = TINY_CASES[0] if tiny else Case("small", 32, steps=8, log_every=2)
    with tempfile.TemporaryDirectory() as folder:
        context = Context("processes", Path(folder), device_name, tiny, [], [], 0.0)
        trainer = build(context, case, Path(folder))
        trainer.group = group
        trainer.batch_sizes.per_process = case.rows // size
        trainer.batch_sizes.train = min(trainer.batch_sizes.train, case.rows // size)
        trainer.train()
        checksum = torch.stack([p.detach().double().sum() for p in trainer.model.parameters()])
        checksums = group.all_gather(checksum.cpu())
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines() if rank == 0 else []
    steps = [x for x in map(json.loads, lines) if x["kind"] == "train"]
    dist.destroy_process_group()
    if rank:
        return None
    return {
        "all_reduce_gb_per_second": numbers.nbytes / min(seconds) / 1e9,
        "real_tokens_per_second": steps[-1]["tokens_per_second"],
        "last_loss": steps[-1]["loss"],
        "replicas_equal": all(torch.equal(x, checksums[0]) for x in checksums),
    }


if __name__ == "__main__":
    metrics = worker(sys.argv[1], sys.argv[2], sys.argv[3] == "1")
    if metrics:
        print(json.dumps(metrics))
