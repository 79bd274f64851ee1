"""Safe rendering of Markdown: nothing in an answer can load, link to or run anything.

Answers are parsed by markdown-it without the rules for links, images, HTML and entities, whose
source is then shown as text. All text is escaped in the HTML output.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token

_DISABLED_RULES = ["link", "image", "autolink", "reference", "html_block", "html_inline", "entity"]
# Formulas keep their backslashes and asterisks. A dollar sign that precedes a digit does not end
# one: it is a price.
_FORMULA = re.compile(
    r"\$\$.{1,2000}?\$\$|\$(?=\S)[^$\n]{1,500}(?<=\S)\$(?!\d)|\\\(.{1,2000}?\\\)|\\\[.{1,2000}?\\\]",
    re.DOTALL,
)
_PLAIN_TOKENS = {"text", "softbreak", "hardbreak"}


@dataclass(frozen=True)
class Part:
    """A section of an answer: plain text, safe HTML, or code."""

    kind: str  # "text", "html", "code"
    content: str
    language: str | None = None


def parts_of(answer: str) -> list[Part]:
    """Split an answer into parts, in order."""
    lines = re.split(r"\r\n?|\n", answer)
    parts: list[Part] = []
    prose: list[Token] = []
    for token in _PARSER.parse("\n".join(lines)):
        if token.level == 0 and token.type in ("fence", "code_block"):
            parts += _prose(prose, lines)
            parts.append(Part("code", token.content, _language(token.info)))
            prose = []
        else:
            prose.append(token)
    return parts + _prose(prose, lines)


def _prose(tokens: Sequence[Token], lines: Sequence[str]) -> list[Part]:
    if not tokens:
        return []
    if all(_is_plain(token) for token in tokens):
        spans = [token.map for token in tokens if token.map]  # (first line, line after the last)
        return [Part("text", "\n".join(lines[spans[0][0] : spans[-1][1]]))]
    return [Part("html", _PARSER.renderer.render(tokens, _PARSER.options, {}))]


def _is_plain(token: Token) -> bool:
    """Return True for a paragraph, or text whose source and rendering are the same."""
    if token.type != "inline":
        return token.type in ("paragraph_open", "paragraph_close")
    children = token.children or []
    text = "".join(child.content for child in children)
    is_verbatim = "".join(text.split()) == "".join(token.content.split())
    return is_verbatim and {child.type for child in children} <= _PLAIN_TOKENS


def _language(info: str) -> str | None:
    name = next(iter(info.lower().split()), "")
    return name if re.fullmatch(r"[a-z0-9+#-]{1,20}", name) else None


def label(text: str) -> str:
    """Escape text for a button: Streamlit renders its label as Markdown."""
    return re.sub(r"[^\w\s]", lambda m: f"\\{m[0]}" if m[0].isascii() else m[0], text)


def _formula(state: StateInline, silent: bool) -> bool:
    """Inline rule: keep a formula as text."""
    formula = _FORMULA.match(state.src, state.pos, state.posMax)
    if not formula:
        return False
    if not silent:
        state.pending += formula[0]
    state.pos = formula.end()
    return True


def _text_html(_: Any, tokens: Sequence[Token], index: int, *__: Any) -> str:
    return escapeHtml(tokens[index].content).replace("\n", "<br>")


def _code_html(_: Any, tokens: Sequence[Token], index: int, *__: Any) -> str:
    # Line breaks as entities: Streamlit would strip lines that consist of spaces.
    code = escapeHtml(tokens[index].content).replace("\n", "&#10;")
    return f"<pre><code>{code}</code></pre>"


def _create_parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "breaks": True, "xhtmlOut": False})
    parser.enable(["table", "strikethrough"]).disable(_DISABLED_RULES)
    parser.inline.ruler.before("escape", "formula", _formula)
    parser.add_render_rule("text", _text_html)
    for kind in ("fence", "code_block"):
        parser.add_render_rule(kind, _code_html)
    return parser


_PARSER = _create_parser()
