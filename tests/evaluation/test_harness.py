"""What is kept of lm-eval's tasks; test_against_lm_eval.py runs it."""

import json
from pathlib import Path

from minimind.evaluation.harness import run_harness

IDENTITY = {"model": "1", "dtype": "bfloat16"}
SETTINGS = {"task": "lm-eval:sums", "limit": None, "model": "1", "dtype": "float32"}


def test_results_that_are_there_are_not_computed_again(tmp_path: Path) -> None:
    kept = {"settings": SETTINGS, "metrics": {"acc": 0.5}}
    (tmp_path / "lm-eval-sums.json").write_text(json.dumps(kept), encoding="utf-8")
    assert run_harness("sums", tmp_path, tmp_path, identity=IDENTITY, device="cpu") == kept
