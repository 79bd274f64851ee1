import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from minimind.errors import ConfigError, ResourceError, install_line
from minimind.training.metrics import MetricsLog, check_trackers


def lines(path: Path) -> list[dict[str, object]]:
    text = path.read_text("utf-8")
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_each_write_appends_a_line_immediately(path: Path) -> None:
    log = MetricsLog(path)
    log.write({"kind": "train", "step": 1, "loss": 2.5}, timing={"elapsed_s": 0.5})
    log.write({"kind": "sample", "step": 1, "text": "长江\n"})
    assert lines(path) == [  # before the log is closed
        {"kind": "train", "step": 1, "loss": 2.5, "elapsed_s": 0.5},
        {"kind": "sample", "step": 1, "text": "长江\n"},
    ]
    assert "长江" in path.read_text("utf-8")
    log.close()


def test_non_finite_numbers_become_null(path: Path) -> None:
    log = MetricsLog(path)
    log.write({"kind": "train", "step": 1, "loss": float("nan"), "norm": float("inf")})
    log.close()
    assert lines(path) == [{"kind": "train", "step": 1, "loss": None, "norm": None}]


def test_truncate_removes_lines_after_the_checkpoint(path: Path) -> None:
    log = MetricsLog(path)
    log.write({"kind": "train", "step": 1})
    offset = log.offset
    log.write({"kind": "train", "step": 2})
    assert offset < log.offset == path.stat().st_size
    log.close()
    with path.open("ab") as stream:
        stream.write(b'{"kind": "tra')  # killed in the middle of a write
    log = MetricsLog(path)
    assert log.offset == path.stat().st_size
    log.truncate(offset)
    assert log.offset == offset
    log.write({"kind": "train", "step": 3})
    log.close()
    assert [line["step"] for line in lines(path)] == [1, 3]


def test_truncate_does_not_extend_a_shortened_file(path: Path) -> None:
    log = MetricsLog(path)
    log.truncate(1000)
    log.write({"kind": "train", "step": 8})
    log.close()
    assert lines(path) == [{"kind": "train", "step": 8}]


def test_tensorboard_receives_the_numbers(path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(path, trackers=["tensorboard"])
    log.start_trackers(0)
    for step in (1, 2):
        log.write({"kind": "train", "step": step, "loss": 2.5 / step, "norm": None}, {"rate": 7})
        log.write({"kind": "sample", "step": step, "text": "长江"})
    log.close()
    events = EventAccumulator(str(path.parent / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/loss", "train/rate"]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 2.5), (2, 1.25)]


@pytest.mark.usefixtures("ordered_event_files")
@pytest.mark.parametrize("starts", [(0, 0), (0, 3), (0, 3, 2, 3)])
def test_tensorboard_drops_steps_that_a_resumed_run_repeats(
    path: Path, starts: tuple[int, ...]
) -> None:
    """Killed after step 5 and resumed from a checkpoint: each step once, with its newest value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    expected: dict[int, float] = {}
    for life, start in enumerate(starts):
        log = MetricsLog(path, trackers=["tensorboard"])
        log.start_trackers(start)
        expected = {step: value for step, value in expected.items() if step <= start and start}
        for step in range(start + 1 if start else 0, 6):
            expected[step] = float(life)
            log.write({"kind": "train", "step": step, "loss": expected[step]})
        log.close()
    events = EventAccumulator(str(path.parent / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [*expected.items()]


ONLINE_TRACKER = """
import json, pathlib

def record(*line):
    with pathlib.Path({file!r}).open("a") as stream:
        print(json.dumps(line, default=str), file=stream)

def init(**options):
    record("init", options["id"], options["resume"])
    if "{fails}" == "init":
        raise RuntimeError("No API key configured.\\nUse `login`")
    return __import__(__name__)

def log(metrics, step):
    record("log", metrics, step)
    if "{fails}" == "log":
        raise OSError("no route to host")

def finish():
    record("finish")
    if "{fails}" == "finish":
        raise TimeoutError
"""


@pytest.fixture
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Install a stand-in for an online tracker, which records its calls and fails in one."""

    def install(tracker: str, fails: str) -> Path:
        calls, packages = tmp_path / "calls", tmp_path / "packages"
        packages.mkdir(exist_ok=True)
        source = ONLINE_TRACKER.format(file=str(calls), fails=fails)
        (packages / f"{tracker}.py").write_text(source)
        monkeypatch.syspath_prepend(packages)
        monkeypatch.delitem(sys.modules, tracker, raising=False)
        return calls

    yield install
    for tracker in ("wandb", "swanlab"):
        sys.modules.pop(tracker, None)


@pytest.mark.parametrize("tracker", ["wandb", "swanlab"])
def test_an_online_tracker_continues_its_run(
    path: Path, tracker: str, online: Callable[[str, str], Path]
) -> None:
    """A resumed run keeps its id in the tracker; a run that starts over gets a new one."""
    calls = online(tracker, "")
    for start in (0, 4, 4, 0):
        log = MetricsLog(path, trackers=[tracker])
        log.start_trackers(start)
        log.write({"kind": "train", "step": start + 1, "loss": 2.5})
        log.close()
    called = [json.loads(line) for line in calls.read_text().splitlines()]
    inits = [call for call in called if call[0] == "init"]
    first, again, third, anew = (run_id for _, run_id, _ in inits)
    assert first == again == third != anew
    assert {resume for *_, resume in inits} == {"allow"} and len(first) == 21
    assert called[1:3] == [["log", {"train/loss": 2.5}, 1], ["finish"]]


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
@pytest.mark.parametrize("tracker", ["wandb", "swanlab"])
def test_failing_tracker_gives_one_warning(
    path: Path, tracker: str, fails: str, online: Callable[[str, str], Path]
) -> None:
    """Without login or network, the metrics are still written and logged to the other tracker."""
    calls, warnings = online(tracker, fails), list[str]()
    log = MetricsLog(path, trackers=[tracker, "tensorboard"], warn=warnings.append)
    log.start_trackers(0)
    for step in (1, 2):
        log.write({"kind": "train", "step": step, "loss": 2.5})
    log.close()
    assert [line["step"] for line in lines(path)] == [1, 2]
    reasons = {
        "init": "No API key configured.",
        "log": "no route to host",
        "finish": "TimeoutError",
    }
    assert warnings == [
        f"training.trackers: {tracker} failed and will receive no more metrics ({reasons[fails]}). "
        f"Training continues; {path} contains all metrics"
    ]
    names = [json.loads(line)[0] for line in calls.read_text().splitlines()]
    assert names == {"init": ["init"], "log": ["init", "log"]}.get(
        fails, ["init", "log", "log", "finish"]
    )
    assert any((path.parent / "tensorboard").iterdir())


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "swanlab"])
def test_missing_tracker_is_an_error_with_the_install_command(
    tracker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, tracker, None)  # as if it were not installed
    expected = f"training.trackers: {tracker} is not installed; {install_line(tracker)}"
    with pytest.raises(ConfigError, match=re.escape(expected)):
        check_trackers([tracker])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a file that is always full")
def test_full_disk_is_an_error() -> None:
    log = MetricsLog(Path("/dev/full"))
    with pytest.raises(ResourceError, match=r"/dev/full: cannot be written \(.*No space left"):
        log.write({"kind": "train", "step": 1})
    log.close()
