"""Data-parallel training in several processes."""

import json
import random
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from minimind.data.order import Order
from minimind.errors import ConfigError, TrainingError
from minimind.training.distributed import ProcessGroup, _buckets, init_distributed, local_device
from minimind.training.sums import LossSums
from tests.support.small_runs import (
    ForkServer,
    assert_replicas_equal,
    checkpoint_files,
    lora_settings,
    losses,
    metrics,
    run_distributed,
    samples_seen,
)

TOLERANCE = 1e-4  # relative; other splits of a batch round differently


def label_counts(lines: list[dict[str, Any]]) -> list[int]:
    return [line.get("num_label_tokens", line.get("num_pairs")) for line in lines]


def test_shards_of_any_number_of_processes_cover_the_same_samples() -> None:
    """For ten thousand data cursors: the shards in rank order are the global batch."""
    order = Order((700, 45), (1.0, 2.5), seed=3)
    batch = 12
    for cursor in range(0, 10_000 * batch, batch):
        shards = [
            [ProcessGroup(rank, size).shard(cursor, batch) for rank in range(size)]
            for size in (1, 2, 3, 4)
        ]
        for parts in shards:  # contiguous ranges, from the first sample of the batch to the last
            ends = [cursor, *(own.stop for own in parts)]
            assert [*map(range, ends, ends[1:])] == parts and ends[-1] == cursor + batch
        if cursor % (101 * batch) == 0:  # the sequences too
            [expected] = [order.locate(own.start, len(own)) for own in shards[0]]
            for parts in shards[1:]:
                assert [p for own in parts for p in order.locate(own.start, len(own))] == expected


def test_batch_size_that_the_processes_do_not_divide_is_an_error() -> None:
    from minimind.config.settings import TrainingSettings
    from minimind.training.stage import _sequences_per_process

    assert _sequences_per_process(TrainingSettings(global_batch_size=12), ProcessGroup(0, 3)) == 4
    with pytest.raises(
        ConfigError, match=r"training\.global_batch_size=10 is not divisible by 4 processes"
    ):
        _sequences_per_process(TrainingSettings(global_batch_size=10), ProcessGroup(0, 4))
    with pytest.raises(
        ConfigError,
        match=r"micro_batch_size=4 does not divide the 2 sequences per process "
        r"\(global batch size 8, 4 processes\)",
    ):
        _sequences_per_process(
            TrainingSettings(global_batch_size=8, micro_batch_size=4), ProcessGroup(0, 4)
        )


def test_all_processes_of_a_machine_use_its_cpu() -> None:
    assert local_device("cpu", ProcessGroup(1, 2, 1, 2)) == torch.device("cpu")
    assert local_device("cpu", ProcessGroup()) == torch.device("cpu")


def test_one_process_on_a_gpu_names_its_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """`set_device` and NCCL refuse a device without an index."""
    devices = []
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setattr(
        torch.distributed,
        "init_process_group",
        lambda backend, device_id: devices.append(device_id),
    )
    monkeypatch.setattr(torch.distributed, "new_group", lambda **options: None)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    for name, index in (("cuda", 0), ("auto", 0), ("cuda:1", 1)):
        with init_distributed(name) as group:
            assert group.size == 1
        assert devices == [torch.device("cuda", index)] * 2
        devices.clear()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_each_process_needs_its_own_gpu() -> None:
    assert local_device("cuda", ProcessGroup(1, 2, 1, 2)) == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="device=cuda:1: 2 processes need one device each"):
        local_device("cuda:1", ProcessGroup(1, 2, 1, 2))


def never(seconds: float) -> None:
    pytest.fail("slept although no connection was lost")


@pytest.mark.parametrize(
    "message",
    [
        "NCCL error: unhandled cuda error, Last error: Cuda failure 2 'out of memory'",
        "NCCL error: invalid usage (run with NCCL_DEBUG=WARN for details)",
        "ProcessGroupGloo::allgather: invalid tensor size at index 0 (expected (4), got (3))",
        "[enforce fail at pair.cc:456] op.preamble.length <= op.nbytes. 8 vs 4. Received data size "
        "doesn't match expected size. Is there a distributed collective mismatch in your code?",
        "No backend type associated with device type mps",
        "Tensors must be contiguous",
    ],
)
def test_other_errors_of_a_collective_pass_through(
    message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minimind.training.distributed.time.sleep", never)
    before = signal.getsignal(signal.SIGTERM)
    with (
        pytest.raises(RuntimeError, match=re.escape(message)),
        ProcessGroup(0, 2).collective_errors(),
    ):
        raise RuntimeError(message)
    assert signal.getsignal(signal.SIGTERM) is before


def test_other_errors_of_gloo_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minimind.training.distributed.time.sleep", never)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = ProcessGroup(0, 2, 0, 2, dist.group.WORLD)
        with pytest.raises(RuntimeError, match="Invalid scalar type"):
            group.all_reduce_([torch.ones(3).to(torch.float8_e4m3fn)])
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "message",
    [  # of gloo, of torch's store and of NCCL
        "[pair.cc:553] Connection closed by peer [127.0.0.1]:15275. This is typically caused by a "
        "remote worker crashing.",
        "[pair.cc:537] Read error [127.0.0.1]:27282: Connection reset by peer.",
        "[unbound_buffer.cc:78] Timed out waiting 1800000ms for recv operation to complete",
        "wait timeout after 3000ms, keys: /default_pg/0//1//cpu//0/1",
        "Broken pipe",
        "failed to recv, got 0 bytes. Connection was likely closed. Did the remote server crash?",
        "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)",
        "NCCL error: remote process exited or there was a network error",
        "NCCL error: unhandled system error, Last error: socketProgress: Connection closed by "
        "remote peer",
        "NCCL communicator was aborted on rank 0.",
    ],
)
def test_lost_connection_becomes_training_error(
    message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minimind.training.distributed._LAUNCHER_GRACE_S", 0)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with (
            pytest.raises(TrainingError, match="another process of this") as caught,
            ProcessGroup(0, 2).collective_errors(),
        ):
            raise RuntimeError(message)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert str(caught.value.__cause__) == message


def test_rank_without_the_other_variables_of_a_launcher_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with (
        pytest.raises(ConfigError, match=r"LOCAL_RANK is not\. Start several"),
        init_distributed("cpu"),
    ):
        pass


def test_buckets_keep_the_order_and_limit_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minimind.training.distributed._BUCKET_NUMEL", 10)
    sizes = [3, 4, 5, 20, 1, 9, 0, 1]
    tensors = [torch.zeros(size) for size in sizes]
    buckets = [[tensor.numel() for tensor in bucket] for bucket in _buckets(tensors)]
    assert buckets == [[3, 4], [5], [20], [1, 9, 0], [1]]


def test_all_reduced_sums_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Integers stay exact beyond float32, and shapes and dtypes do not change."""

    def double(self: ProcessGroup, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            tensor.mul_(2)

    monkeypatch.setattr(ProcessGroup, "all_reduce_", double)
    metric_sums = {"tokens": torch.tensor([[1 << 40, 1], [2, 3]]), "nats": torch.tensor(0.1)}
    sums = LossSums(torch.tensor(1.5), torch.tensor((1 << 24) + 1), metric_sums, 7)
    sums.all_reduce_(ProcessGroup(0, 2), torch.device("cpu"))
    assert int(sums.count) == 2 * ((1 << 24) + 1)
    assert sums.metric_sums["tokens"].tolist() == [[1 << 41, 2], [4, 6]]
    assert int(sums.num_tokens) == 2 * 7
    assert float(sums.loss_sum) == 3.0 and sums.metric_sums["nats"].dtype == torch.float32


@pytest.mark.numeric
@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        ("pretrain", {}),
        ("pretrain", {"model__preset": "nano-moe", "training__log_every": 3}),
        ("sft", {"optim__name": "adamw"}),
        ("dpo", {}),
    ],
)
def test_several_processes_train_as_one_does(
    fork_server: ForkServer, tmp_path: Path, objective: str, settings: dict[str, Any]
) -> None:
    """The same samples in the same order; losses and counts to rounding."""
    curves = []
    settings = {"held_out": True, "training__steps": 4, "validation__every": 2} | settings
    validations = []
    for processes in (1, 2, 4):
        run = tmp_path / f"{processes}"
        run_distributed(fork_server, run, processes, objective, **settings)
        assert samples_seen(run, processes) == list(range(16))
        assert_replicas_equal(run, processes)
        curves.append(metrics(run, "train"))
        validations.append([line["loss"] for line in metrics(run, "validation")])
    for curve in curves[1:]:
        assert label_counts(curve) == label_counts(curves[0])
        assert curve[0].keys() == curves[0][0].keys()
        for name in ("loss", "grad_norm"):
            values = [line[name] for line in curve]
            assert values == pytest.approx([line[name] for line in curves[0]], rel=TOLERANCE)
    for validation in validations[1:]:
        assert validation == pytest.approx(validations[0], rel=TOLERANCE) and len(validation) == 2


@pytest.mark.parametrize("objective", ["pretrain", "lora"])
def test_resume_with_the_same_number_of_processes_gives_the_same_bits(
    fork_server: ForkServer, tmp_path: Path, objective: str
) -> None:
    """Each rank draws its own dropout masks, again after a resume."""
    kind, settings = ("sft", lora_settings()) if objective == "lora" else (objective, {})
    uninterrupted, run = tmp_path / "uninterrupted", tmp_path / "run"
    run_distributed(fork_server, uninterrupted, 2, kind, **settings)
    # Two micro-batches per step: the first stop comes between them, on rank 1.
    for stop in ((1, 6), (0, 5)):
        run_distributed(fork_server, run, 2, kind, stop=stop, **settings)
    run_distributed(fork_server, run, 2, kind, **settings)
    assert metrics(run) == metrics(uninterrupted)
    assert checkpoint_files(run, 8) == checkpoint_files(uninterrupted, 8)
    assert_replicas_equal(run, 2)


def test_random_kills_of_random_ranks_change_nothing(
    fork_server: ForkServer, tmp_path: Path
) -> None:
    """Ten kills. The launcher kills the other rank."""
    uninterrupted, run, dice = tmp_path / "uninterrupted", tmp_path / "run", random.Random("kills")
    settings = {"training__steps": 40, "checkpoint__every": 3}
    run_distributed(fork_server, uninterrupted, 2, **settings)
    for _ in range(10):
        kill = (dice.randrange(2), dice.randrange(1, 14))
        assert f"rank {kill[0]} failed" in run_distributed(
            fork_server, run, 2, kill=kill, **settings
        )
    run_distributed(fork_server, run, 2, **settings)
    assert metrics(run) == metrics(uninterrupted)
    assert checkpoint_files(run, 40) == checkpoint_files(uninterrupted, 40)


def test_rank_without_a_launcher_reports_that_another_has_ended(
    fork_server: ForkServer, tmp_path: Path
) -> None:
    """As on a machine other than that of the lost process."""
    output = run_distributed(fork_server, tmp_path, 2, kill=(1, 5), unwatched=True)
    assert "process 0 of 0-1: another process of this run has ended; run the same command" in output


def test_resume_with_another_number_of_processes(fork_server: ForkServer, tmp_path: Path) -> None:
    """From 1 to 2 to 1: the same samples, losses within 1e-4 of those of one process."""
    uninterrupted, run = tmp_path / "uninterrupted", tmp_path / "run"
    settings = {"training__steps": 30}
    run_distributed(fork_server, uninterrupted, 1, **settings)
    samples = []
    for processes, stop in ((1, (0, 41)), (2, (1, 21)), (1, None)):
        output = run_distributed(fork_server, run, processes, stop=stop, **settings)
        samples += samples_seen(run, processes)
    assert "resuming from step 20" in output
    assert samples == list(range(120))
    assert losses(run) == pytest.approx(losses(uninterrupted), rel=TOLERANCE)


@pytest.mark.parametrize("processes", [2, 4])
def test_all_ranks_validate(fork_server: ForkServer, tmp_path: Path, processes: int) -> None:
    """Each rank evaluates a shard of the held-out sequences; metrics equal those of one process.

    With five sequences, the last of four ranks has none.
    """
    settings = {"model__preset": "nano-moe", "held_out": True, "validation__num_sequences": 5}
    settings |= {"validation__every": 4}
    for number in (1, processes):
        run_distributed(fork_server, tmp_path / f"{number}", number, **settings)
    run = tmp_path / f"{processes}"
    read = [json.loads((run / f"held-out-{rank}").read_text()) for rank in range(processes)]
    parts = {2: [[0, 1, 2], [3, 4]], 4: [[0, 1], [2, 3], [4], []]}[processes]
    assert read == [[[start, 1] for start in part] * 2 for part in parts]
    single, distributed = (metrics(tmp_path / f"{n}", "validation") for n in (1, processes))
    assert [line["step"] for line in distributed] == [4, 8]
    for line, expected in zip(distributed, single, strict=True):
        assert line.pop("kind") == expected.pop("kind")
        assert line == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)


def test_stop_during_validation_reaches_all_ranks(fork_server: ForkServer, tmp_path: Path) -> None:
    """Rank 1 gets a signal at its second of three sequences. The resumed run validates first."""
    uninterrupted, run = tmp_path / "uninterrupted", tmp_path / "run"
    settings = {"held_out": True, "validation__num_sequences": 6, "validation__every": 2}
    settings |= {"training__steps": 4}
    run_distributed(fork_server, uninterrupted, 2, **settings)
    run_distributed(fork_server, run, 2, stop=(1, 6), **settings)
    assert {(run / f"steps-{rank}").read_text() for rank in range(2)} == {"2"}
    assert metrics(run, "validation") == []
    assert [json.loads((run / f"held-out-{rank}").read_text()) for rank in range(2)] == [
        [[0, 1], [1, 1]],
        [[3, 1], [4, 1]],
    ]
    run_distributed(fork_server, run, 2, **settings)
    assert metrics(run) == metrics(uninterrupted)
    assert checkpoint_files(run, 4) == checkpoint_files(uninterrupted, 4)


def test_out_of_memory_on_one_rank_reduces_the_evaluation_batch_size_of_all(
    fork_server: ForkServer, tmp_path: Path
) -> None:
    uninterrupted, run = tmp_path / "uninterrupted", tmp_path / "run"
    settings = {"held_out": True, "validation__num_sequences": 8, "validation__every": 4}
    settings |= {"training__micro_batch_size": 2, "training__steps": 4}
    run_distributed(fork_server, uninterrupted, 2, **settings)
    output = run_distributed(
        fork_server, run, 2, out_of_memory=(1, [6]), **settings
    )  # the second batch of its validation
    assert output == "0: out of memory on cpu while evaluating 2 sequences; continuing with 1\n"
    assert json.loads((run / "held-out-0").read_text()) == [[0, 2], [2, 2], [2, 1], [3, 1]]
    [line], [expected] = (metrics(path, "validation") for path in (run, uninterrupted))
    assert line["loss"] == pytest.approx(expected["loss"], rel=TOLERANCE)
    assert checkpoint_files(run, 4) == checkpoint_files(uninterrupted, 4)


def test_reference_logprobs_of_held_out_pairs_are_sharded(
    fork_server: ForkServer, tmp_path: Path
) -> None:
    """Most held-out sequences do not occur in the two training steps."""
    settings = {"held_out": True, "validation__num_sequences": 13, "training__steps": 2}
    for processes in (1, 2, 4):
        run_distributed(fork_server, tmp_path / f"{processes}", processes, "dpo", **settings)
    single, *others = (metrics(tmp_path / f"{n}", "validation") for n in (1, 2, 4))
    assert single[0]["loss"] > 0
    for lines in others:
        for name in ("loss", "logps/chosen", "logps/rejected"):
            assert lines[0][name] == pytest.approx(single[0][name], rel=TOLERANCE)


def test_signal_to_one_rank_stops_all_at_the_same_step(
    fork_server: ForkServer, tmp_path: Path
) -> None:
    for number, stop in enumerate([(0, 7), (1, 8), (2, 9)]):
        run = tmp_path / f"{number}"
        run_distributed(
            fork_server, run, 4, stop=stop, training__global_batch_size=8, training__steps=20
        )
        steps = {int((run / f"steps-{rank}").read_text()) for rank in range(4)}
        assert len(steps) == 1 and steps < {3, 4}
        [saved] = (run / "checkpoints").iterdir()
        assert saved.name == f"step-{steps.pop():08}"


def test_non_finite_gradient_of_one_rank_skips_the_step_on_all(
    fork_server: ForkServer, tmp_path: Path
) -> None:
    """NaN on rank 1. With two micro-batches per step, calls 9 and 10 belong to step 5."""
    settings = {"checkpoint__every": 1, "checkpoint__keep": 99}
    output = run_distributed(fork_server, tmp_path, 2, corrupt=(1, [9]), **settings)
    assert output == "0: step 5 (samples 16-19): non-finite gradient; step skipped\n"
    assert checkpoint_files(tmp_path, 5)["model"] == checkpoint_files(tmp_path, 4)["model"]
    assert checkpoint_files(tmp_path, 5) == checkpoint_files(tmp_path, 4)
    assert checkpoint_files(tmp_path, 6) != checkpoint_files(tmp_path, 5)
    assert_replicas_equal(tmp_path, 2)


@pytest.mark.numeric
def test_rank_without_label_tokens_takes_part(fork_server: ForkServer, tmp_path: Path) -> None:
    """The second half of each batch has no labels: the complete shard of rank 1."""
    settings = {"unlabeled": [2, 3]}
    for processes in (1, 2):
        run_distributed(fork_server, tmp_path / f"{processes}", processes, "sft", **settings)
    single, distributed = (metrics(tmp_path / f"{processes}", "train") for processes in (1, 2))
    assert label_counts(distributed) == label_counts(single)
    assert [line["loss"] for line in distributed] == pytest.approx(
        [line["loss"] for line in single], rel=TOLERANCE
    )
    assert_replicas_equal(tmp_path / "2", 2)
