import json
import re
import sys
from pathlib import Path

import pytest

from minimind.errors import ConfigError, ResourceError, install_line
from minimind.training.metrics import MetricsLog


def lines(path: Path) -> list[dict[str, object]]:
    text = path.read_text("utf-8")
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_one_line_for_each_write_at_once(path: Path) -> None:
    log = MetricsLog(path)
    log.write({"kind": "train", "step": 1, "loss": 2.5}, timing={"elapsed_s": 0.5})
    log.write({"kind": "sample", "step": 1, "text": "长江\n"})
    assert lines(path) == [  # before it is closed
        {"kind": "train", "step": 1, "loss": 2.5, "elapsed_s": 0.5},
        {"kind": "sample", "step": 1, "text": "长江\n"},
    ]
    assert "长江" in path.read_text("utf-8")
    log.close()


def test_what_is_not_finite_is_null(path: Path) -> None:
    log = MetricsLog(path)
    log.write({"kind": "train", "step": 1, "loss": float("nan"), "norm": float("inf")})
    log.close()
    assert lines(path) == [{"kind": "train", "step": 1, "loss": None, "norm": None}]


def test_a_run_that_goes_on_forgets_what_came_after_its_checkpoint(path: Path) -> None:
    log = MetricsLog(path)
    log.write({"kind": "train", "step": 1})
    offset = log.offset
    log.write({"kind": "train", "step": 2})
    assert offset < log.offset == path.stat().st_size
    log.close()
    with path.open("ab") as stream:
        stream.write(b'{"kind": "tra')  # killed in the middle
    log = MetricsLog(path)
    assert log.offset == path.stat().st_size
    log.truncate(offset)
    assert log.offset == offset
    log.write({"kind": "train", "step": 3})
    log.close()
    assert [line["step"] for line in lines(path)] == [1, 3]


def test_a_file_that_was_shortened_is_not_filled_up(path: Path) -> None:
    log = MetricsLog(path)
    log.truncate(1000)
    log.write({"kind": "train", "step": 8})
    log.close()
    assert lines(path) == [{"kind": "train", "step": 8}]


def test_tensorboard_gets_the_numbers(path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(path, trackers=["tensorboard"])
    for step in (1, 2):
        log.write({"kind": "train", "step": step, "loss": 2.5 / step, "norm": None}, {"rate": 7})
        log.write({"kind": "sample", "step": step, "text": "长江"})
    log.close()
    events = EventAccumulator(str(path.parent / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/loss", "train/rate"]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 2.5), (2, 1.25)]


@pytest.mark.parametrize(
    ("tracker", "module"),
    [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb"), ("swanlab", "swanlab")],
)
def test_a_tracker_that_is_not_installed_is_named_with_what_installs_it(
    path: Path, tracker: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not there
    expected = f"training.trackers: {tracker} is not installed; {install_line(tracker)}"
    with pytest.raises(ConfigError, match=re.escape(expected)):
        MetricsLog(path, trackers=[tracker])
    assert not path.exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a file that is always full")
def test_a_full_disk_is_told() -> None:
    log = MetricsLog(Path("/dev/full"))
    with pytest.raises(ResourceError, match=r"/dev/full: cannot be written \(.*No space left"):
        log.write({"kind": "train", "step": 1})
    log.close()
