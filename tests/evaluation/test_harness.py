"""Stored results of lm-eval; test_against_lm_eval.py runs lm-eval itself."""

import json
from pathlib import Path

from minimind.evaluation.harness import run_harness

IDENTITY = {"model": "1", "dtype": "bfloat16"}
SETTINGS = {"task": "lm-eval:sums", "limit": None, "model": "1", "dtype": "float32"}


def test_stored_results_are_reused(tmp_path: Path) -> None:
    kept = {"settings": SETTINGS, "metrics": {"acc": 0.5}, "model": "model"}
    (tmp_path / "lm-eval-sums.json").write_text(json.dumps(kept), encoding="utf-8")
    found = run_harness("sums", "mine", tmp_path, tmp_path, identity=IDENTITY, device="cpu")
    assert found == kept | {"model": "mine"}
