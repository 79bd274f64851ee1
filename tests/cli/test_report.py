"""`minimind report`: names of the files."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from minimind.cli.main import app


@pytest.mark.parametrize("name", ["page.md", "page.MD"])
def test_the_page_does_not_have_the_name_of_its_markdown(name: str, tmp_path: Path) -> None:
    """The Markdown would replace the page."""
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    out = tmp_path / name
    done = CliRunner().invoke(app, ["report", str(tmp_path), "--out", str(out)])
    assert done.stderr == (
        f"error: {out} is the name of the Markdown file beside the page; give "
        f"{tmp_path / 'page.html'}\n"
    )
    assert done.exit_code == 1 and not out.exists()


def test_a_markdown_file_of_others_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    notes = tmp_path / "notes.md"
    notes.write_text("mine")
    command = ["report", str(tmp_path), "--out", str(tmp_path / "notes.html")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1 and "notes.md exists and would be replaced" in done.stderr
    assert notes.read_text() == "mine"
    notes.unlink()
    for _ in range(2):  # its own Markdown is replaced
        CliRunner().invoke(app, command)
        assert notes.read_text().startswith("# ")
