"""JSON without what the standard leaves open: no NaN, no duplicate keys, no broken characters."""

import json
import re
from typing import Any

_HALF_PAIR = re.compile("[\ud800-\udfff]")


def parse_json(text: str) -> Any:
    """Parse strict JSON. Raises ValueError with the reason; NaN and duplicate keys are refused."""
    if "\x00" in text:
        raise ValueError("a NUL character")
    try:
        value = json.loads(
            text,
            parse_constant=_no_constant,
            parse_int=_short_integer,
            object_pairs_hook=_no_duplicates,
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if "\\u0000" in text or "\\ud" in text or "\\uD" in text:
        check_characters(value)
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _short_integer(digits: str) -> int:
    if len(digits) > 4000:  # Python itself refuses some more
        raise ValueError("a number of thousands of digits")
    return int(digits)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key that comes twice")
    return value


def check_characters(value: Any) -> None:
    """Raise ValueError when a string somewhere in `value` holds NUL or half a UTF-16 pair."""
    waiting = [value]
    while waiting:
        here = waiting.pop()
        if isinstance(here, str):
            if "\x00" in here:
                raise ValueError("a NUL character")
            if _HALF_PAIR.search(here):
                raise ValueError("half a UTF-16 pair (lone surrogate)")
        elif isinstance(here, dict):
            waiting += [*here.keys(), *here.values()]
        elif isinstance(here, list):
            waiting += here
