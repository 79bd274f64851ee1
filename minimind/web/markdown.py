"""Markdown of users and models for the page: nothing in it may load, link or run anything.

Answers are parsed by markdown-it. Rules for links, images, HTML and entities are off, so that their
source is shown as text, and every character of text is escaped on its way into HTML.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token

_SHOWN_AS_TEXT = ["link", "image", "autolink", "reference", "html_block", "html_inline", "entity"]
# Formulas keep their backslashes and asterisks. A dollar sign before a digit is a price.
_FORMULA = re.compile(
    r"\$\$.{1,2000}?\$\$|\$(?=\S)[^$\n]{1,500}(?<=\S)\$(?!\d)|\\\(.{1,2000}?\\\)|\\\[.{1,2000}?\\\]",
    re.DOTALL,
)
_PLAIN = {"text", "softbreak", "hardbreak"}


@dataclass(frozen=True)
class Part:
    """A stretch of an answer: plain text, safe HTML, or code."""

    kind: str  # "text", "html", "code"
    content: str
    language: str | None = None


def parts_of(answer: str) -> list[Part]:
    """Split an answer into the parts that the page shows one below the other."""
    lines = re.split(r"\r\n?|\n", answer)
    found: list[Part] = []
    prose: list[Token] = []
    for token in _PARSER.parse("\n".join(lines)):
        if token.level == 0 and token.type in ("fence", "code_block"):
            found += _prose(prose, lines)
            found.append(Part("code", token.content, _language(token.info)))
            prose = []
        else:
            prose.append(token)
    return found + _prose(prose, lines)


def _prose(tokens: Sequence[Token], lines: Sequence[str]) -> list[Part]:
    if not tokens:
        return []
    if all(_is_plain(token) for token in tokens):
        places = [token.map for token in tokens if token.map]
        return [Part("text", "\n".join(lines[places[0][0] : places[-1][1]]))]
    return [Part("html", _PARSER.renderer.render(tokens, _PARSER.options, {}))]


def _is_plain(token: Token) -> bool:
    """Whether a token is a paragraph, or text of one that is shown as it was written."""
    if token.type != "inline":
        return token.type in ("paragraph_open", "paragraph_close")
    children = token.children or []
    text = "".join(child.content for child in children)
    is_as_written = "".join(text.split()) == "".join(token.content.split())
    return is_as_written and {child.type for child in children} <= _PLAIN


def _language(info: str) -> str | None:
    word = next(iter(info.lower().split()), "")
    return word if re.fullmatch(r"[a-z0-9+#-]{1,20}", word) else None


def label(text: str) -> str:
    """Text for a button, whose labels are Markdown too."""
    return re.sub(r"[^\w\s]", lambda found: _escaped(found[0]), text)


def _escaped(character: str) -> str:
    return f"\\{character}" if character.isascii() else character


def _formula(state: StateInline, silent: bool) -> bool:
    """Take a formula as text."""
    found = _FORMULA.match(state.src, state.pos, state.posMax)
    if not found:
        return False
    if not silent:
        state.pending += found[0]
    state.pos = found.end()
    return True


def _text_html(_: Any, tokens: Sequence[Token], place: int, *__: Any) -> str:
    return escapeHtml(tokens[place].content).replace("\n", "<br>")


def _code_html(_: Any, tokens: Sequence[Token], place: int, *__: Any) -> str:
    # Streamlit would trim lines of spaces: there are none to see.
    code = escapeHtml(tokens[place].content).replace("\n", "&#10;")
    return f"<pre><code>{code}</code></pre>"


def _make_parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "breaks": True, "xhtmlOut": False})
    parser.enable(["table", "strikethrough"]).disable(_SHOWN_AS_TEXT)
    parser.inline.ruler.before("escape", "formula", _formula)
    parser.add_render_rule("text", _text_html)
    for kind in ("fence", "code_block"):
        parser.add_render_rule(kind, _code_html)
    return parser


_PARSER = _make_parser()
