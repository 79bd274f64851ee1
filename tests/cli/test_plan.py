import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from minimind.cli.main import app
from minimind.cli.plan import duration, parse_size
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


def test_plan_gives_the_reason_for_what_it_does_not_know(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("长江很长。\n" * 50, "utf-8")
    small = ["plan", "model.preset=nano", "data.seq_len=32", "training.global_batch_size=4"]
    data = ["--data", str(tmp_path / "texts.txt")]
    here = ["--device", "cpu", "--trial", "0"]
    missing = ["--device", "cuda:9", "--memory", "1GB"]
    for arguments, rows in (
        (here, {"steps": "unknown without --data", "device": "cpu, "}),
        ([*data, *here], {"steps": "unknown without --tokenizer"}),
        (
            missing,
            {
                "device": "cuda:9 (not in this machine), bf16 assumed",
                "tokens per second": "not measured: no device",
            },
        ),
        (
            [*missing, "training.precision=fp16"],
            {"device": "cuda:9 (not in this machine), fp16 assumed"},
        ),
    ):
        done = CliRunner().invoke(app, [*small, *arguments], env={"COLUMNS": "200"})
        assert done.exit_code == 0, done.output
        cells = [line.strip("│ ").split(" │ ") for line in done.output.splitlines()]
        found = {row[0].strip(): row[1].strip() for row in cells if len(row) == 2}
        for name, expected in rows.items():
            assert expected in found[name], found
        assert "–" not in found.values() and "?" not in done.output


def test_sizes_and_durations() -> None:
    assert parse_size("2GB") == parse_size("2 GiB") == parse_size("2048MB") == 2 << 30
    assert parse_size("1.5gb") == 3 << 29
    for wrong in ("", "much", "-1GB", "0", "nanGB", "1PB"):
        with pytest.raises(UsageError, match="such as 2GB"):
            parse_size(wrong)
    seconds = (40, 720, 11_100, 400_000)
    assert [duration(s) for s in seconds] == ["40 s", "12 min", "3 h 05 min", "4.6 days"]
