"""Normalization of text: Unicode NFC, line breaks, white space, remnants of control tokens."""

import re
import unicodedata

# Control tokens that earlier preparations left as text; between two of them is a document.
_CONTROL_TOKENS = re.compile(r"</?s>|<(?:unk|pad)>|<\|endoftext\|>")
_LINE_BREAKS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
# Invisible: C0 and C1 controls, soft hyphen, zero-width space, direction marks, word joiner, BOM.
# The zero-width joiners stay, because emoji and some scripts need them.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\ufeff]"
)
_WIDE_INDENT = re.compile("^[ \t\xa0]*\u3000[ \t\xa0\u3000]*", re.M)
_SPACES = re.compile("[\xa0\u2000-\u200a\u202f\u205f\u3000]")
_SPACE_RUNS = re.compile(r"(?<=\S)[ \t]{2,}(?=\S)")
_SPACE_AT_LINE_END = re.compile(r"[ \t]+$", re.M)
_BLANK_LINES = re.compile(r"\n{3,}")


def normalize(text: str) -> str:
    """Return the normalized text; it may be empty. Normalizing again changes nothing.

    Indentation by ASCII spaces or tabs stays, because source code needs it; that of Chinese
    paragraphs, by ideographic spaces, is removed.
    """
    # --8<-- [start:normalize]
    if "<" in text:
        text = _CONTROL_TOKENS.sub("\n", text)
    if not text.isascii() and not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
    text = _LINE_BREAKS.sub("\n", text)
    text = _INVISIBLE.sub("", text)
    if "\u3000" in text:
        text = _WIDE_INDENT.sub("", text)
    text = _SPACES.sub(" ", text)
    text = _SPACE_RUNS.sub(" ", text)
    text = _SPACE_AT_LINE_END.sub("", text)
    return _BLANK_LINES.sub("\n\n", text).strip()
    # --8<-- [end:normalize]
