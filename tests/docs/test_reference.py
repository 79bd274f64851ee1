"""The generated reference pages."""

import shutil
from pathlib import Path

import pytest

from docs import reference
from minimind.serving.errors import ERROR_CODES
from minimind.serving.requests import (
    UNSUPPORTED,
    ChatRequest,
    CompletionRequest,
    JsonSchema,
    Message,
)


def test_every_command_and_setting_is_documented() -> None:
    pages = reference.pages()
    assert "## minimind train\n" in pages["en/reference/cli.md"]
    assert "### minimind checkpoints list\n" in pages["en/reference/cli.md"]
    for lang in ("en", "zh"):
        rows = pages[f"{lang}/reference/cli.md"].splitlines()
        assert any(row.startswith("| `--port <int>` | `8000` | ") for row in rows)
        assert all(row.count(" | ") == 2 for row in rows if row.startswith("| `"))
        rows = pages[f"{lang}/reference/settings.md"].splitlines()
        names = [row.split("`")[1] for row in rows if row.startswith("| `")]
        assert names == [name for name, _ in reference.settings()]
        assert all(row.count(" | ") == 4 for row in rows if row.startswith("| `"))
        rows = pages[f"{lang}/reference/preparation.md"].splitlines()
        assert sum(row.startswith("| `") for row in rows) == 18
        assert any(row.startswith("| `length.maximum` | `1_000_000` | ") for row in rows)
        assert all(row.replace("\\|", "").count("|") == 5 for row in rows if row.startswith("| `"))
    assert not any(line.endswith(" ") for text in pages.values() for line in text.splitlines())


def test_http_reference_lists_every_parameter_and_error() -> None:
    pages = reference.pages()
    for lang in ("en", "zh"):
        rows = pages[f"{lang}/reference/http.md"].splitlines()
        first_cells = {row.split("`")[1] for row in rows if row.startswith("| `")}
        for model in (ChatRequest, CompletionRequest, Message, JsonSchema):
            names = {field.alias or name for name, field in model.model_fields.items()}
            assert names <= first_cells
        assert UNSUPPORTED.keys() <= first_cells
        assert "minimind_time_to_first_token_seconds" in first_cells
        for code, error in ERROR_CODES.items():
            assert any(row.startswith(f"| {error.status} | `{code}` |") for row in rows)


def test_stale_pages_are_named_until_they_are_written(tmp_path: Path) -> None:
    assert reference.stale_pages(tmp_path) == sorted(reference.pages())
    reference.write_pages(tmp_path)
    assert reference.stale_pages(tmp_path) == []
    (tmp_path / "en/reference/cli.md").write_text("old", encoding="utf-8")
    assert reference.stale_pages(tmp_path) == ["en/reference/cli.md"]


def test_pages_do_not_depend_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    before = reference.pages()
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert reference.pages() == before


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"seed" =', '"sead" =', r"missing \['seed'\], left over \['sead'\]"),
        ('"seed" =', '"more" = "x"\n"seed" =', r"missing \[\], left over \['more'\]"),
        ('"Random seed." =', '"Random." =', r"missing \['Random seed.'\], left over \['Random.'\]"),
        ('"Run directory." =', '"Run." =', r"missing \['Run directory.'\], left over \['Run.'\]"),
    ],
)
def test_a_text_without_its_chinese_is_an_error(
    old: str, new: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (reference.DOCS / "translations.toml").read_text("utf-8")
    (tmp_path / "translations.toml").write_text(text.replace(old, new), encoding="utf-8")
    monkeypatch.setattr(reference, "DOCS", tmp_path)
    with pytest.raises(ValueError, match=message):
        reference.pages()
    shutil.rmtree(tmp_path)
