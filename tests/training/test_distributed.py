"""Rows 2, 6 and 7 of the reliability promises where several processes share a run."""

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
from minimind.training.distributed import ProcessGroup, _buckets, join, local_device
from minimind.training.sums import LossSums
from tests.support.small_runs import (
    Lives,
    assert_in_step,
    files_of,
    lora_settings,
    losses,
    metrics,
    samples,
    share,
)

CLOSE = 1e-4


def label_counts(lines: list[dict[str, Any]]) -> list[int]:
    return [line["num_label_tokens"] for line in lines]


def test_ten_thousand_cursors_are_shared_out_to_any_number_of_processes() -> None:
    """Row 2: the shares of 1, 2, 3 and 4 processes, one after the other, are the same samples."""
    order = Order((700, 45), (1.0, 2.5), seed=3)
    batch = 12
    for cursor in range(0, 10_000 * batch, batch):
        shares = [
            [ProcessGroup(rank, size).shard(cursor, batch) for rank in range(size)]
            for size in (1, 2, 3, 4)
        ]
        for parts in shares:
            assert [sample for own in parts for sample in own] == [*range(cursor, cursor + batch)]
        if cursor % (101 * batch) == 0:  # and so are the windows
            [whole] = [order.locate(own.start, len(own)) for own in shares[0]]
            for parts in shares[1:]:
                assert [p for own in parts for p in order.locate(own.start, len(own))] == whole


def test_a_batch_that_cannot_be_shared_out_is_refused() -> None:
    from minimind.config.settings import TrainingSettings
    from minimind.training.stage import _share

    assert _share(TrainingSettings(global_batch_size=12), ProcessGroup(0, 3)) == 4
    with pytest.raises(
        ConfigError, match=r"training\.global_batch_size=10 is not divisible by 4 processes"
    ):
        _share(TrainingSettings(global_batch_size=10), ProcessGroup(0, 4))
    with pytest.raises(
        ConfigError, match=r"micro_batch_size=4: each of 4 processes takes 2 sequences"
    ):
        _share(TrainingSettings(global_batch_size=8, micro_batch_size=4), ProcessGroup(0, 4))


def test_all_processes_of_a_machine_share_its_cpu() -> None:
    assert local_device("cpu", ProcessGroup(1, 2, 1, 2)) == torch.device("cpu")
    assert local_device("cpu", ProcessGroup()) == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_each_process_needs_a_gpu_of_its_own() -> None:
    assert local_device("cuda", ProcessGroup(1, 2, 1, 2)) == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="device=cuda:1: 2 processes need a device each"):
        local_device("cuda:1", ProcessGroup(1, 2, 1, 2))


def never(seconds: float) -> None:
    pytest.fail("nobody is waited for")


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
def test_an_error_of_a_collective_stays_what_it_is(
    message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minimind.training.distributed.time.sleep", never)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError, match=re.escape(message)), ProcessGroup(0, 2)._company():
        raise RuntimeError(message)
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_error_of_gloo_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minimind.training.distributed.time.sleep", never)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        workers = ProcessGroup(0, 2, 0, 2, dist.group.WORLD)
        with pytest.raises(RuntimeError, match="Invalid scalar type"):
            workers.all_reduce_([torch.ones(3).to(torch.float8_e4m3fn)])
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
def test_a_lost_connection_is_a_process_that_has_ended(
    message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minimind.training.distributed._KILLED_WITHIN_S", 0)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with (
            pytest.raises(TrainingError, match="another process of this") as caught,
            ProcessGroup(0, 2)._company(),
        ):
            raise RuntimeError(message)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert str(caught.value.__cause__) == message


def test_a_rank_that_no_launcher_has_given_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ConfigError, match="LOCAL_RANK is not: start several"), join("cpu"):
        pass


def test_buckets_keep_order_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minimind.training.distributed._BUCKET", 10)
    sizes = [3, 4, 5, 20, 1, 9, 0, 1]
    tensors = [torch.zeros(size) for size in sizes]
    buckets = [[tensor.numel() for tensor in bucket] for bucket in _buckets(tensors)]
    assert buckets == [[3, 4], [5], [20], [1, 9, 0], [1]]


def test_sums_are_exact_in_double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole numbers stay whole, whatever their type, and shapes stay what they are."""

    def double(self: ProcessGroup, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            tensor.mul_(2)

    monkeypatch.setattr(ProcessGroup, "all_reduce_", double)
    more = {"tokens": torch.tensor([[1 << 40, 1], [2, 3]]), "nats": torch.tensor(0.1)}
    sums = LossSums(torch.tensor(1.5), torch.tensor((1 << 24) + 1), more, 7)
    sums.over(ProcessGroup(0, 2), torch.device("cpu"))
    assert int(sums.count) == 2 * ((1 << 24) + 1)
    assert sums.more["tokens"].tolist() == [[1 << 41, 2], [4, 6]]
    assert int(sums.tokens) == 2 * 7
    assert float(sums.loss) == 3.0 and sums.more["nats"].dtype == torch.float32


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
def test_two_processes_and_four_do_what_one_does(
    lives: Lives, tmp_path: Path, objective: str, settings: dict[str, Any]
) -> None:
    """Row 6: the same samples in the same order; losses and counts to rounding."""
    curves = []
    settings = {"held_out": True, "validation__every": 4} | settings
    validations = []
    for processes in (1, 2, 4):
        run = tmp_path / f"{processes}"
        share(lives, run, processes, objective, **settings)
        assert samples(run, processes) == list(range(32))
        assert_in_step(run, processes)
        curves.append(metrics(run, "train"))
        validations.append([line["loss"] for line in metrics(run, "validation")])
    for curve in curves[1:]:
        assert label_counts(curve) == label_counts(curves[0])
        assert curve[0].keys() == curves[0][0].keys()
        for name in ("loss", "grad_norm"):
            told = [line[name] for line in curve]
            assert told == pytest.approx([line[name] for line in curves[0]], rel=CLOSE)
    for validation in validations[1:]:
        assert validation == pytest.approx(validations[0], rel=CLOSE) and len(validation) == 2


@pytest.mark.parametrize("objective", ["pretrain", "lora"])
def test_as_many_processes_go_on_to_the_same_bits(
    lives: Lives, tmp_path: Path, objective: str
) -> None:
    """Row 1 for two processes; dropout draws other numbers in each, and the same ones again."""
    kind, settings = ("sft", lora_settings()) if objective == "lora" else (objective, {})
    whole, run = tmp_path / "whole", tmp_path / "run"
    share(lives, whole, 2, kind, **settings)
    # Two micro-batches a step: the first stop is between them, in the process that is not first.
    for stop in ((1, 6), (0, 5)):
        share(lives, run, 2, kind, stop=stop, **settings)
    share(lives, run, 2, kind, **settings)
    assert metrics(run) == metrics(whole)
    assert files_of(run, 8) == files_of(whole, 8)
    assert_in_step(run, 2)


def test_ten_random_kills_of_a_random_process_change_nothing(lives: Lives, tmp_path: Path) -> None:
    """Row 1 for two processes; the one that is left is killed by whoever has started both."""
    whole, run, dice = tmp_path / "whole", tmp_path / "run", random.Random("kills")
    settings = {"training__steps": 40, "checkpoint__every": 3}
    share(lives, whole, 2, **settings)
    for _ in range(10):
        kill = (dice.randrange(2), dice.randrange(1, 14))
        assert f"rank {kill[0]} failed" in share(lives, run, 2, kill=kill, **settings)
    share(lives, run, 2, **settings)
    assert metrics(run) == metrics(whole)
    assert files_of(run, 40) == files_of(whole, 40)


def test_one_that_nobody_ends_says_that_another_is_gone(lives: Lives, tmp_path: Path) -> None:
    """As on another machine than the one where a process was lost."""
    said = share(lives, tmp_path, 2, kill=(1, 5), alone=True)
    assert "process 0 of 0-1: another process of this run has ended; the same command" in said


def test_another_number_of_processes_goes_on(lives: Lives, tmp_path: Path) -> None:
    """Row 6, from 1 to 2 to 1: the same samples, losses within 1e-4 of those of one process."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    settings = {"training__steps": 30}
    share(lives, whole, 1, **settings)
    seen = []
    for processes, stop in ((1, (0, 41)), (2, (1, 21)), (1, None)):
        said = share(lives, run, processes, stop=stop, **settings)
        seen += samples(run, processes)
    assert "going on from step 20" in said
    assert seen == list(range(120))
    assert losses(run) == pytest.approx(losses(whole), rel=CLOSE)


@pytest.mark.parametrize("processes", [2, 4])
def test_all_processes_validate(lives: Lives, tmp_path: Path, processes: int) -> None:
    """Each reads its part of the held-out windows, and the figures are those of one process.

    With five windows the fourth of four processes has none.
    """
    settings = {"model__preset": "nano-moe", "held_out": True, "validation__num_sequences": 5}
    settings |= {"validation__every": 4}
    for number in (1, processes):
        share(lives, tmp_path / f"{number}", number, **settings)
    run = tmp_path / f"{processes}"
    read = [json.loads((run / f"held-out-{rank}").read_text()) for rank in range(processes)]
    parts = {2: [[0, 1, 2], [3, 4]], 4: [[0, 1], [2, 3], [4], []]}[processes]
    assert read == [[[start, 1] for start in part] * 2 for part in parts]
    alone, together = (metrics(tmp_path / f"{n}", "validation") for n in (1, processes))
    assert [line["step"] for line in together] == [4, 8]
    for found, wanted in zip(together, alone, strict=True):
        assert found.pop("kind") == wanted.pop("kind")
        assert found == pytest.approx(wanted, rel=CLOSE, abs=CLOSE)


def test_a_stop_in_a_validation_reaches_all_processes(lives: Lives, tmp_path: Path) -> None:
    """A signal to the second of two, in its second window of three; the validation comes again."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    settings = {"held_out": True, "validation__num_sequences": 6, "validation__every": 2}
    settings |= {"training__steps": 4}
    share(lives, whole, 2, **settings)
    share(lives, run, 2, stop=(1, 6), **settings)
    assert {(run / f"steps-{rank}").read_text() for rank in range(2)} == {"2"}
    assert metrics(run, "validation") == []
    assert [json.loads((run / f"held-out-{rank}").read_text()) for rank in range(2)] == [
        [[0, 1], [1, 1]],
        [[3, 1], [4, 1]],
    ]
    share(lives, run, 2, **settings)
    assert metrics(run) == metrics(whole)
    assert files_of(run, 4) == files_of(whole, 4)


def test_where_a_validation_does_not_fit_in_one_process_all_take_fewer_windows(
    lives: Lives, tmp_path: Path
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    settings = {"held_out": True, "validation__num_sequences": 8, "validation__every": 4}
    settings |= {"training__micro_batch_size": 2, "training__steps": 4}
    share(lives, whole, 2, **settings)
    said = share(lives, run, 2, short=(1, [6]), **settings)  # the second part of its validation
    assert (
        said == "0: too little memory on cpu to evaluate 2 windows at once; 1 window from now on\n"
    )
    assert json.loads((run / "held-out-0").read_text()) == [[0, 2], [2, 2], [2, 1], [3, 1]]
    [found], [wanted] = (metrics(place, "validation") for place in (run, whole))
    assert found["loss"] == pytest.approx(wanted["loss"], rel=CLOSE)
    assert files_of(run, 4) == files_of(whole, 4)


def test_references_of_held_out_pairs_are_shared_out_too(lives: Lives, tmp_path: Path) -> None:
    """Most of the held-out windows are not among those of the two steps."""
    settings = {"held_out": True, "validation__num_sequences": 13, "training__steps": 2}
    for processes in (1, 2, 4):
        share(lives, tmp_path / f"{processes}", processes, "dpo", **settings)
    alone, *others = (metrics(tmp_path / f"{n}", "validation") for n in (1, 2, 4))
    assert alone[0]["loss"] > 0
    for lines in others:
        for name in ("loss", "logps/chosen", "logps/rejected"):
            assert lines[0][name] == pytest.approx(alone[0][name], rel=CLOSE)


def test_a_signal_to_one_process_stops_all_at_the_same_step(lives: Lives, tmp_path: Path) -> None:
    for number, stop in enumerate([(0, 7), (1, 8), (2, 9)]):
        run = tmp_path / f"{number}"
        share(lives, run, 4, stop=stop, training__global_batch_size=8, training__steps=20)
        steps = {int((run / f"steps-{rank}").read_text()) for rank in range(4)}
        assert len(steps) == 1 and steps < {3, 4}
        [saved] = (run / "checkpoints").iterdir()
        assert saved.name == f"step-{steps.pop():08}"


def test_bad_numbers_of_one_process_are_skipped_by_all(lives: Lives, tmp_path: Path) -> None:
    """Row 7: one rank's NaN; two micro-batches a step, so that calls 9 and 10 are of step 5."""
    settings = {"checkpoint__every": 1, "checkpoint__keep": 99}
    said = share(lives, tmp_path, 2, spoil=(1, [9]), **settings)
    assert said == (
        "0: step 5 (samples 16-19): the gradient is not finite; nothing was changed by it\n"
    )
    assert files_of(tmp_path, 5)["model"] == files_of(tmp_path, 4)["model"]
    assert files_of(tmp_path, 5) == files_of(tmp_path, 4)
    assert files_of(tmp_path, 6) != files_of(tmp_path, 5)
    assert_in_step(tmp_path, 2)


@pytest.mark.numeric
def test_a_process_with_nothing_to_learn_takes_part(lives: Lives, tmp_path: Path) -> None:
    """The latter half of each batch, which is all that the second of two processes has."""
    settings = {"idle": [2, 3]}
    for processes in (1, 2):
        share(lives, tmp_path / f"{processes}", processes, "sft", **settings)
    alone, together = (metrics(tmp_path / f"{processes}", "train") for processes in (1, 2))
    assert label_counts(together) == label_counts(alone)
    assert [line["loss"] for line in together] == pytest.approx(
        [line["loss"] for line in alone], rel=CLOSE
    )
    assert_in_step(tmp_path / "2", 2)
