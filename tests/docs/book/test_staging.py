"""A chapter as a page of the site."""

from pathlib import Path

import pytest

from docs.book import staging
from docs.book.chapters import LANGUAGES, Chapter, chapters

CHAPTERS = [pytest.param(chapter, id=chapter.stem) for chapter in chapters()]


@pytest.mark.parametrize("lang", LANGUAGES)
@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_page_has_figures_formulas_and_its_piece(
    chapter: Chapter, lang: str, tmp_path: Path
) -> None:
    pytest.importorskip("latex2mathml")
    page = staging.site_page(chapter, lang, tmp_path)
    assert "<!--=" not in page and "$$" not in page and "\\_" not in page
    num_figures = len(list(chapter.outputs.glob(f"*.{lang}.svg")))
    assert page.count('<svg role="img" aria-label="') == num_figures
    assert page.count("<math") == page.count("</math>") > 0
    assert "\n<math" not in page  # Markdown would end the paragraph
    assert f'<script src="{chapter.stem}.js"></script>' in page
    assert f', "{lang}")</script>' in page
    assert (tmp_path / f"{chapter.stem}.js").is_file()
    assert f"notebooks/book/{lang}/{chapter.stem}.ipynb" in page


def test_only_chapters_are_staged_so() -> None:
    [first, *_] = chapters()
    assert staging.chapter_of(first.page("zh")) == first
    assert staging.chapter_of(first.page("zh").with_name("index.md")) is None
