from pathlib import Path

import pytest

from minimind.cli.help_pages import help_pages, stale_pages, write_pages


def test_each_verb_has_a_page() -> None:
    pages = help_pages()
    assert "Usage: minimind train [OPTIONS]" in pages["train.md"]
    assert "(train.md)" in pages["README.md"]
    assert not any(line.endswith(" ") for text in pages.values() for line in text.splitlines())


def test_written_pages_are_in_step_and_others_are_told(tmp_path: Path) -> None:
    assert stale_pages(tmp_path) == sorted(help_pages())
    write_pages(tmp_path)
    assert stale_pages(tmp_path) == []
    (tmp_path / "train.md").write_text("old", encoding="utf-8")
    (tmp_path / "gone.md").write_text("a verb that is no more", encoding="utf-8")
    assert stale_pages(tmp_path) == ["gone.md", "train.md"]
    write_pages(tmp_path)
    assert stale_pages(tmp_path) == []


def test_pages_do_not_depend_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    before = help_pages()
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert help_pages() == before
