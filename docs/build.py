"""Build and check the documentation site.

    python -m docs.build              # write the site to site/en and site/zh
    python -m docs.build --check      # compare the languages, look for stale pages and dead links

One Zensical build per language, offline, from plain Markdown in `docs/en` and `docs/zh`. Pages are
staged in a temporary folder first, where links that leave `docs/` are followed: benchmark records
become pages of the site, and source files become pages that show the file. On a code host the same
relative links lead to the files themselves.
"""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from docs import reference
from docs.book import checks, staging

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LANGUAGES = {"en": "English", "zh": "中文"}
READMES = ("README.md", "README.zh-CN.md")
TOP_PAGES = (*READMES, "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
_SHARED = ("images", "assets")  # folders of docs/ that both languages use
_FENCE = re.compile(r"^( *)(```+|~~~+).*?^\1\2[ \t]*$", re.M | re.S)
_INLINE_CODE = re.compile(r"`[^`\n]*`")
_CODE = re.compile(f"{_FENCE.pattern}|{_INLINE_CODE.pattern}", re.M | re.S)
_HEADING = re.compile(r"^(#{1,6}) ", re.M)
_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
_SYMBOL_LINK = re.compile(r"\[`([\w.]+)`\]\(([^)\s#]+\.py)\)")
_INCLUDE = re.compile(r'(?<!;)--8<-- "([^"]+)"')  # ; shows the line itself
_IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)")
_LANGUAGE_TAGS = {
    ".py": "python", ".toml": "toml", ".json": "json", ".sh": "sh", ".yml": "yaml",
    "Makefile": "make",
}  # fmt: skip
# The theme loads a polyfill for its search from another host; current browsers do not need it.
_OUTSIDE_SCRIPT = re.compile(r'<script src="https?://[^>]*></script>')

# The site's root: one page that leads to the reader's language.
_ROOT_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>minimind</title>
<script>
  location.replace((navigator.language.startsWith("zh") ? "zh" : "en") + "/index.html");
</script>
<p><a href="en/index.html">English</a> · <a href="zh/index.html">中文</a></p>
</html>
"""


def main() -> None:
    """Run the checks, then build unless `--check` is given; exit 1 with the list of problems."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="check only; write nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "site")
    args = parser.parse_args()
    if problems := find_problems():
        sys.exit("documentation:\n  " + "\n  ".join(problems))
    if not args.check:
        build(args.out)
        print(f"site: {args.out / 'index.html'}")


def find_problems() -> list[str]:
    """Return one line per difference between the languages, stale page or missing target."""
    problems = [f"docs/{page}: stale; run: make format" for page in reference.stale_pages(DOCS)]
    problems += checks.find_problems()
    nav = set(nav_pages(read_nav()))
    names = {lang: page_names(DOCS / lang) for lang in LANGUAGES}
    for lang, pages in names.items():
        problems += [f"docs/{lang}/{name}: not in docs/nav.toml" for name in sorted(pages - nav)]
        problems += [
            f"docs/{lang}/{name}: missing, but in docs/nav.toml" for name in sorted(nav - pages)
        ]
    for name in sorted(names["en"] & names["zh"]):
        english, chinese = (outline((DOCS / lang / name).read_text("utf-8")) for lang in LANGUAGES)
        problems += [
            f"docs/*/{name}: the languages differ in {what}: en {english[what]}, zh {chinese[what]}"
            for what in english
            if english[what] != chinese[what]
        ]
    english, chinese = (outline((ROOT / name).read_text("utf-8")) for name in READMES)
    problems += [
        f"README: the languages differ in {what}: en {english[what]}, zh {chinese[what]}"
        for what in english
        if english[what] != chinese[what]
    ]
    pages = [DOCS / lang / name for lang in LANGUAGES for name in sorted(names[lang])]
    for page in (*(ROOT / name for name in TOP_PAGES), *pages):
        problems += missing_targets(page)
    return problems


def outline(text: str) -> dict[str, list[str]]:
    """Return what both languages of a page must share, in order."""
    prose = _FENCE.sub("", text)
    blocks = [match.group(0) for match in _FENCE.finditer(text)]
    return {
        "headings": _HEADING.findall(prose),
        "code regions": [checks.without_language(name) for name in _INCLUDE.findall(text)],
        "images": [checks.without_language(Path(name).name) for _, name in _IMAGE.findall(prose)],
        "code blocks": [_without_comments(block) for block in blocks],
        **checks.outline(_INLINE_CODE.sub("", prose)),
    }


def _without_comments(block: str) -> str:
    """Return a fenced block; of shell code without comments, of text only the fence."""
    first, *lines = block.strip().splitlines()
    if first.strip(" `~") != "sh":
        return first.strip()
    code = (line.partition("  #")[0].rstrip() for line in lines if not line.startswith("#"))
    return "\n".join([first.strip(), *filter(None, code)])


def missing_targets(page: Path) -> list[str]:
    """Return one line per dead relative link, missing symbol and missing region of a page."""
    problems = []
    text = page.read_text("utf-8")
    shown = page.relative_to(ROOT)
    for _, target, _, _ in _LINK.findall(_INLINE_CODE.sub("", _FENCE.sub("", text))):
        is_relative = "://" not in target and not target.startswith("mailto:")
        if is_relative and not (page.parent / target).resolve().exists():
            problems.append(f"{shown}: broken link {target}")
    problems += [
        f"{shown}: the image {target} has no description"
        for alt, target in _IMAGE.findall(text)
        if not alt.strip()
    ]
    for symbol, target in _SYMBOL_LINK.findall(text):
        file = (page.parent / target).resolve()
        if file.is_file() and not symbol.endswith(".py") and symbol not in defined_names(file):
            problems.append(f"{shown}: {target} defines no {symbol}")
    for include in _INCLUDE.findall(text):
        name, _, region = include.partition(":")
        file = ROOT / name
        if not file.is_file():
            problems.append(f"{shown}: no file {name} to include")
        elif region and f"--8<-- [start:{region}]" not in file.read_text("utf-8"):
            problems.append(f"{shown}: {name} has no region {region}")
    return problems


@cache
def defined_names(file: Path) -> frozenset[str]:
    """Return the classes, functions, variables and `Class.member`s that a module defines."""

    def names_in(body: list[ast.stmt], prefix: str) -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from names_in(node.body, f"{prefix}{node.name}.")
            if isinstance(node, ast.Assign):
                yield from (prefix + name.id for name in node.targets if isinstance(name, ast.Name))
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                yield prefix + node.target.id

    return frozenset(names_in(ast.parse(file.read_text("utf-8")).body, ""))


def page_names(folder: Path) -> set[str]:
    """Return the Markdown files below `folder`, as relative POSIX paths."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.md")}


def read_nav() -> list[dict[str, object]]:
    """Read `docs/nav.toml`: sections and pages in order, titled in each language."""
    return list(tomllib.loads((DOCS / "nav.toml").read_text("utf-8"))["section"])


def nav_pages(nav: list[dict[str, object]]) -> list[str]:
    """Return every page of the navigation in order."""
    pages: list[str] = []
    for section in nav:
        pages += [str(page["path"]) for page in section["pages"]]  # type: ignore[attr-defined]
    return pages


def build(out: Path) -> None:
    """Write the site: one Zensical build per language, and a root page that chooses one."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="minimind-docs-") as work:
        for lang in LANGUAGES:
            stage = Path(work) / lang
            staged(lang, stage)
            config = Path(work) / f"{lang}.toml"
            config.write_text(zensical_config(lang, stage, Path(work) / "site" / lang), "utf-8")
            command = [
                sys.executable,
                "-m",
                "zensical",
                "build",
                "--strict",
                "--clean",
                "-f",
                config,
            ]
            done = subprocess.run(command, cwd=work, env=os.environ | {"NO_COLOR": "1"})
            if done.returncode:
                sys.exit(f"documentation: the {LANGUAGES[lang]} site was not built; see above")
            shutil.copytree(Path(work) / "site" / lang, out / lang)
    for page in out.rglob("*.html"):
        text = page.read_text("utf-8")
        page.write_text(_OUTSIDE_SCRIPT.sub("", text), "utf-8")
    (out / "index.html").write_text(_ROOT_PAGE, "utf-8")


def staged(lang: str, stage: Path) -> None:
    """Copy one language's pages to `stage`, with everything that they link to outside of it."""
    shutil.copytree(DOCS / lang, stage)
    for folder in _SHARED:
        if (DOCS / folder).is_dir():
            shutil.copytree(DOCS / folder, stage / folder)
    done: set[Path] = set()
    waiting = sorted(stage.rglob("*.md"))
    while waiting:
        page = waiting.pop()
        if page in done:
            continue
        done.add(page)
        origin = _origin(page, stage, lang)
        text = page.read_text("utf-8")
        if chapter := staging.chapter_of(origin):
            text = staging.site_page(chapter, lang, page.parent)
        pieces, at = [], 0
        for code in _CODE.finditer(text):  # links in code are text
            pieces += [
                _rewritten(text[at : code.start()], page, origin, stage, waiting),
                code.group(0),
            ]
            at = code.end()
        pieces.append(_rewritten(text[at:], page, origin, stage, waiting))
        page.write_text("".join(pieces), "utf-8")


def _origin(page: Path, stage: Path, lang: str) -> Path:
    """Return the repository file that a staged page was made from."""
    name = page.relative_to(stage)
    if name.parts[0] == "records":
        return ROOT / "benchmarks" / name
    return DOCS / lang / name


def _rewritten(text: str, page: Path, origin: Path, stage: Path, waiting: list[Path]) -> str:
    """Return `text` with links out of `docs/` led to staged copies, which join `waiting`."""

    def moved(match: re.Match[str]) -> str:
        before, target, anchor, after = match.groups()
        if "://" in target or target.startswith("mailto:"):
            return match.group(0)
        file = (origin.parent / target).resolve()
        language = DOCS / (origin.relative_to(DOCS).parts[0] if DOCS in origin.parents else "en")
        if language in file.parents:
            return match.group(0)
        copy = _staged_copy(file, stage, waiting)
        link = os.path.relpath(copy, page.parent).replace(os.sep, "/")
        return f"{before}{link}{anchor or ''}{after}"

    return _LINK.sub(moved, text)


def _staged_copy(file: Path, stage: Path, waiting: list[Path]) -> Path:
    """Stage one linked file and return its path there."""
    if DOCS in file.parents and file.relative_to(DOCS).parts[0] in _SHARED:
        return stage / file.relative_to(DOCS)
    records = ROOT / "benchmarks" / "records"
    if records in file.parents:
        copy = stage / "records" / file.relative_to(records)
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
            if copy.suffix == ".md":
                waiting.append(copy)
        return copy
    name = file.relative_to(ROOT)
    if file.suffix == ".ipynb":
        copy = stage / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
        return copy
    copy = stage / "source" / f"{name.as_posix()}.md"
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(_source_page(file, name), "utf-8")
    return copy


def _source_page(file: Path, name: Path) -> str:
    if file.is_dir():
        listing = "\n".join(sorted(path.name + "/" * path.is_dir() for path in file.iterdir()))
        return f"# `{name}`\n\n```text\n{listing}\n```\n"
    tag = _LANGUAGE_TAGS.get(file.suffix, _LANGUAGE_TAGS.get(file.name, "text"))
    return f"# `{name}`\n\n````{tag}\n{file.read_text('utf-8').rstrip()}\n````\n"


def zensical_config(lang: str, stage: Path, site: Path) -> str:
    """Return the TOML configuration of one language's build."""
    sections = []
    for section in read_nav():
        pages = ", ".join(
            f'{{"{page[lang]}" = "{page["path"]}"}}'
            for page in section["pages"]  # type: ignore
        )
        sections.append(
            f'  {{"{section[lang]}" = [{pages}]}},' if section.get(lang) else f"  {pages},"
        )
    alternate = "\n".join(
        f'[[project.extra.alternate]]\nname = "{name}"\n'
        f'link = "../{code}/index.html"\nlang = "{code}"'
        for code, name in LANGUAGES.items()
    )
    template = (DOCS / "zensical.toml").read_text("utf-8")
    values = {
        "LANG": lang, "DOCS_DIR": stage.name, "SITE_DIR": f"site/{lang}", "ROOT": ROOT.as_posix(),
        "NAV": "\n".join(sections), "ALTERNATE": alternate,
    }  # fmt: skip
    for key, value in values.items():
        template = template.replace(f"@{key}@", value)
    return template


if __name__ == "__main__":
    main()
