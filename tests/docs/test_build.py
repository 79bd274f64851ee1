"""The documentation site: its checks, and one complete build.

`make style` runs the checks on the documentation itself.
"""

import json
import re
import sys
import tomllib
from pathlib import Path

import pytest

from docs import build
from tests.support.shared import shared_directory


def test_both_languages_must_share_headings_code_and_regions() -> None:
    english = (
        '# A\n\n## B\n\n```sh\nminimind demo  # try\n```\n\n--8<-- "x.py:r"\n\n![a](../i.png)\n'
    )
    chinese = (
        '# 甲\n\n## 乙\n\n```sh\nminimind demo  # 试试\n```\n\n--8<-- "x.py:r"\n\n![甲](../i.png)\n'
    )
    assert build.outline(english) == build.outline(chinese)
    for change in ("### B", "minimind chat  #", '"x.py:s"', "j.png"):
        old = {"### B": "## B", "minimind chat  #": "minimind demo  #"}.get(change)
        old = old or {'"x.py:s"': '"x.py:r"', "j.png": "i.png"}[change]
        assert build.outline(english.replace(old, change)) != build.outline(chinese), change
    assert build.outline("```sh\n# not a heading\n```\n")["headings"] == []


def test_dead_links_missing_symbols_and_missing_regions_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "ROOT", tmp_path)
    (tmp_path / "code.py").write_text(
        "# --8<-- [start:there]\nclass A:\n    b: int\n    def c(self): ...\nD = 1\n"
        "# --8<-- [end:there]\n"
    )
    page = tmp_path / "page.md"
    page.write_text(
        "[a](page.md) [b](gone.md#x) [c](https://example.com) `[d](none.md)`\n"
        "[`A.b`](code.py) [`A.c`](code.py) [`D`](code.py) [`code.py`](code.py) [`c`](code.py)\n"
        '--8<-- "code.py:there"\n--8<-- "code.py:gone"\n--8<-- "none.py"\n'
        ';--8<-- "shown.py"\n![](page.md)\n'
    )
    assert build.missing_targets(page) == [
        "page.md: broken link gone.md",
        "page.md: the image page.md has no description",
        "page.md: code.py defines no c",
        "page.md: code.py has no region gone",
        "page.md: no file none.py to include",
    ]


@pytest.mark.parametrize("lang", build.LANGUAGES)
def test_every_term_of_the_glossary_links_to_its_code(lang: str) -> None:
    rows = re.findall(r"^\| .*", (build.DOCS / lang / "glossary.md").read_text("utf-8"), re.M)
    terms = [row for row in rows if not row.startswith(("| term |", "| 术语 |"))]
    assert len(terms) > 60
    assert [row for row in terms if not build._SYMBOL_LINK.search(row)] == []


@pytest.mark.parametrize("lang", build.LANGUAGES)
def test_the_architecture_page_has_the_checked_layers(lang: str) -> None:
    settings = tomllib.loads((build.ROOT / "pyproject.toml").read_text("utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    page = (build.DOCS / lang / "architecture.md").read_text("utf-8")
    rows = re.findall(r"^\| (\d+) \| \[`([\w.]+)`\]", page, re.M)
    layers = [set(re.findall(r"\w+", layer)) for layer in reversed(contracts[0]["layers"])]
    for number, layer in enumerate(layers, 1):
        assert {name.removesuffix(".py") for n, name in rows if n == str(number)} == layer
    assert len(rows) == sum(map(len, layers))
    rules = page.partition("\n## ")[2].partition("`lint-imports`")[2].partition("\n## ")[0]
    assert rules.count("\n- ") == len(contracts) - 1


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built documentation; read-only."""
    pytest.importorskip("latex2mathml")
    pytest.importorskip("zensical")

    def fill(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["docs.build", "--out", str(folder / "site")])
            patch.setattr(build, "find_problems", list)  # see above
            build.main()

    return shared_directory(tmp_path_factory, "documentation", fill) / "site"


def test_every_page_is_built_in_both_languages(site: Path) -> None:
    for lang in build.LANGUAGES:
        for name in build.nav_pages(build.read_nav()):
            page = (site / lang / name).with_suffix(".html")
            assert f'lang="{lang}"' in page.read_text("utf-8"), page
    assert (site / "en" / "records" / "demo.html").is_file()  # a record is a page of the site
    assert (site / "en/source/minimind/model/attention.py.html").is_file()  # so is a source file
    assert list((site / "zh" / "notebooks" / "book" / "zh").glob("*.ipynb"))  # to be downloaded


def test_the_site_loads_nothing_from_other_hosts(site: Path) -> None:
    loads = re.compile(r"""<(?:script|img|iframe)[^>]*\bsrc="https?:|<link[^>]*\bhref="https?:""")
    for page in site.rglob("*.html"):
        assert not loads.search(page.read_text("utf-8")), page


def test_chinese_terms_are_in_the_search_index(site: Path) -> None:
    index = json.loads((site / "zh" / "search.json").read_text("utf-8"))
    assert "梯度累积" in json.dumps(index, ensure_ascii=False)
