"""The steps that `demo` and `road` share."""

import json
import os
from pathlib import Path

import pytest

from minimind.cli.steps import check_results, finished_summary, timed, train_stage
from minimind.errors import UsageError
from tests.support.small_runs import nano_recipe
from tests.support.stages import write_corpus


def test_total_time_includes_earlier_sessions(tmp_path: Path) -> None:
    """A session that was killed counts up to the last change of its metrics."""
    path = tmp_path / "time.json"
    path.write_text(json.dumps({"seconds": 1_000.0}), encoding="utf-8")
    with pytest.raises(KeyboardInterrupt), timed(tmp_path, "demo") as total:
        assert total() >= 1_000
        raise KeyboardInterrupt
    stored = json.loads(path.read_text("utf-8"))
    assert stored.keys() == {"command", "seconds"} and stored["seconds"] >= 1_000
    path.write_text(json.dumps({"seconds": 1_000.0, "began": 5_000.0}), encoding="utf-8")
    (tmp_path / "pretrain").mkdir()
    metrics = tmp_path / "pretrain" / "metrics.jsonl"
    metrics.write_text("{}\n")
    os.utime(path, (5_000, 5_000))
    os.utime(metrics, (5_300, 5_300))
    with timed(tmp_path, "demo") as total:
        assert total() >= 1_300
        assert json.loads(path.read_text("utf-8"))["seconds"] == 1_300


def test_summary_of_an_older_version_is_refused(tmp_path: Path) -> None:
    assert finished_summary(tmp_path, "demo") is None
    summary = tmp_path / "summary.json"
    summary.write_text(json.dumps({"quiz": {}, "eight": []}), encoding="utf-8")
    with pytest.raises(UsageError, match=r"summary\.json was written by an older .* with --fresh"):
        finished_summary(tmp_path, "demo")
    summary.write_text(json.dumps({"quiz": {}, "questions": []}), encoding="utf-8")
    assert finished_summary(tmp_path, "demo") == {"quiz": {}, "questions": []}


def test_a_stage_without_held_out_data_is_trained(tmp_path: Path, tokenizer_dir: Path) -> None:
    settings = {
        "data__sources": [str(write_corpus(tmp_path) / "text.jsonl")],
        "data__store": str(tmp_path / "stores"),
        "data__validation_fraction": 0.0,
        "tokenizer": str(tokenizer_dir),
        "training__steps": 1,
    }
    result = train_stage(nano_recipe("pretrain", tmp_path / "run", **settings), None)
    assert result.finished and "bits_per_byte" not in result.summary


@pytest.mark.parametrize("name", ["report.md", "summary.json", "time.json", "model/config.json"])
def test_files_of_others_are_not_replaced(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text('["mine"]', encoding="utf-8")
    with pytest.raises(UsageError, match="is not from an earlier run of this command"):
        check_results(tmp_path, "demo", ["pretrain"], fresh=True)
    with pytest.raises(UsageError, match="is not from an earlier run of this command"):
        check_results(tmp_path, "demo", ["pretrain"], fresh=False)
    (tmp_path / "time.json").write_text('{"seconds": 3}', encoding="utf-8")
    check_results(tmp_path, "demo", ["pretrain"], fresh=True)
