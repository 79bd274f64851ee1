import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from minimind.cli.main import app
from minimind.cli.plan import duration, parse_size, size
from minimind.errors import UsageError


def test_plan_recommends_what_fits(tmp_path: Path) -> None:
    metrics = tmp_path / "plan.json"
    arguments = ["plan", "pretrain-base", "--memory", "3GB", "--trial", "0", "--device", "cpu"]
    result = CliRunner().invoke(app, [*arguments, "--json", str(metrics)])
    assert result.exit_code == 0, result.output
    assert "108,749,568" in result.output
    assert "It fits with training.activation_checkpointing=true" in result.output
    found = json.loads(metrics.read_text())
    assert found["parameters"] == 108_749_568
    assert found["micro_batch_size"] is None
    assert found["memory_total"] == sum(found["memory"].values()) > 3 << 30


def test_sizes_and_durations() -> None:
    assert parse_size("2GB") == parse_size("2 GiB") == parse_size("2048MB") == 2 << 30
    assert parse_size("1.5gb") == 3 << 29
    for wrong in ("", "much", "-1GB", "0", "nanGB", "1PB"):
        with pytest.raises(UsageError, match="such as 2GB"):
            parse_size(wrong)
    assert [size(n) for n in (3 << 29, 800 << 20)] == ["1.50 GB", "800 MB"]
    seconds = (40, 720, 11_100, 400_000)
    assert [duration(s) for s in seconds] == ["40 s", "12 min", "3 h 05 min", "4.6 days"]
