"""The demo notebook: its code cells run from top to bottom."""

import contextlib
import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "demo.ipynb"
# Constants of the notebook, reduced so that it runs in seconds.
SMALLER = {
    "STEPS = 600": "STEPS = 4",
    'PRESET = "demo"': 'PRESET = "nano"',
    "1_000_000": "60_000",
    "30_000": "3_000",
    "50_000": "400",
    "5_000": "100",
    "2_000": "80",
    '"multiple_choice_questions": 500': '"multiple_choice_questions": 20',
    "vocab_size=3200": "vocab_size=500",
    "limit=40": "limit=4",
}


def code_cells() -> list[str]:
    """Return the source of each code cell."""
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_the_notebook_is_stored_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
    for source in code_cells():
        compile(source, str(NOTEBOOK), "exec")


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = "\n".join(code_cells())
    for text, smaller in SMALLER.items():
        assert text in source, text
        source = source.replace(text, smaller, 1)
    names: dict[str, object] = {"__name__": "notebook"}
    with contextlib.chdir(tmp_path):
        exec(compile(source, str(NOTEBOOK), "exec"), names)
    assert "bits per byte on held-out text" in capsys.readouterr().out
    metrics = names["metrics"]
    assert isinstance(metrics, dict) and metrics["questions"] == 4
