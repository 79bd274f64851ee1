"""Text of users and models for the page: nothing in it may load, link or run anything.

Streamlit shows HTML as text by itself. What is left of Markdown that reaches out, images and
links, and what Streamlit adds to it, is taken away here; what sets text, such as lists and bold
words, stays.
"""

import re
from dataclasses import dataclass

_FENCE = re.compile(r"^```([^`\n]*)\n(.*?)(?:^```[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
_SETS_TEXT = re.compile(
    r"\*\*|(?<!\w)\*\S|`[^`\n]+`|^ {0,3}(?:#{1,6} |[-*+] |\d{1,3}[.)] |> )|^\|.*\|[ \t]*$",
    re.MULTILINE,
)
# Escaped, these are characters: HTML, links and images, formulas, directives, entities, fences.
_REACHES_OUT = re.compile(r"[\\<\[\]!$:&~@]")
# These become links by themselves, escaped or not, unless something invisible keeps them apart.
_ADDRESS = re.compile(r"(?<=www)(?=\.)|(?<=[a-z]:)(?=//)|(?=@)", re.IGNORECASE)
_JOINER = "\u2060"


@dataclass(frozen=True)
class Part:
    """A stretch of an answer: plain text, Markdown that is safe to show, or code."""

    kind: str  # "text", "markdown", "code"
    content: str
    language: str | None = None


def parts_of(answer: str) -> list[Part]:
    """An answer as what it is to be shown as, in order."""
    found: list[Part] = []
    end = 0
    for fence in _FENCE.finditer(answer):
        found += _prose(answer[end : fence.start()])
        language = fence[1].strip().lower()
        known = language if re.fullmatch(r"[a-z0-9+#-]{1,20}", language) else None
        found.append(Part("code", fence[2].rstrip("\n"), known))
        end = fence.end()
    return found + _prose(answer[end:])


def _prose(text: str) -> list[Part]:
    if not text.strip():
        return []
    if not _SETS_TEXT.search(text):
        return [Part("text", text.strip("\n"))]
    return [Part("markdown", _safe(text))]


def _safe(text: str) -> str:
    escaped = _REACHES_OUT.sub(r"\\\g<0>", _ADDRESS.sub(_JOINER, text))
    return escaped.replace("\n", "  \n")  # a line's end is meant


def label(text: str) -> str:
    """Text for a button, whose labels are Markdown too."""
    return re.sub(r"[^\w\s]", lambda found: _escaped(found[0]), text)


def _escaped(character: str) -> str:
    return f"\\{character}" if character.isascii() else character
