"""Standard input and output of the commands that generate text."""

import sys
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator
from typing import TYPE_CHECKING

from minimind.errors import UsageError

if TYPE_CHECKING:
    from minimind.inference.engine import Engine
    from minimind.model import Transformer

# Control characters can manipulate a terminal; text needs only line breaks and tabs.
_CONTROLS = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def strip_controls(text: str) -> str:
    """Remove control characters, such as those that begin escape sequences."""
    return text.translate(_CONTROLS)


def stdin_lines() -> Iterator[str]:
    """Yield lines of standard input as they arrive.

    Raises UsageError for bytes that are not text in the encoding of standard input.
    """
    encoding = sys.stdin.encoding
    # Decoded line by line: a text stream decodes ahead, so its errors have no line number.
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            text = line.decode(encoding)
        except UnicodeDecodeError:
            likely = "utf-16" if line.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else "gb18030"
            raise UsageError(
                f"standard input, line {number}: not {encoding} text; convert it first, "
                f"for example with: iconv -f {likely} -t utf-8"
            ) from None
        yield text.removeprefix("\ufeff" if number == 1 else "")


def report_short_context(engine: "Engine", model: "Transformer", context: int | None) -> None:
    """Warn on stderr if free memory limits the context to less than the model's own."""
    trained = model.config.max_position_embeddings
    if context is None and engine.context < trained:
        print(
            f"warning: free memory allows a context of only {engine.context:,} tokens; "
            f"the model supports {trained:,}",
            file=sys.stderr,
        )
