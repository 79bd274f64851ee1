"""Strict JSON: no NaN or infinity, no duplicate keys, no NUL characters or lone surrogates."""

import json
import re
from typing import Any

_SURROGATE = re.compile("[\ud800-\udfff]")


def parse_json(text: str) -> Any:
    """Parse strict JSON. Raises ValueError with the reason if it is invalid."""
    if "\x00" in text:
        raise ValueError("a NUL character")
    try:
        value = json.loads(
            text,
            parse_constant=_reject_constant,
            parse_int=_parse_integer,
            object_pairs_hook=_unique_keys,
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if "\\u0000" in text or "\\ud" in text or "\\uD" in text:
        check_characters(value)
    return value


def _reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _parse_integer(digits: str) -> int:
    if len(digits) > 4000:  # Python's limit is 4,300
        raise ValueError("an integer of more than 4,000 digits")
    return int(digits)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a duplicate key")
    return value


def check_characters(value: Any) -> None:
    """Raise ValueError when a string anywhere in `value` has a NUL character or lone surrogate."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            if "\x00" in item:
                raise ValueError("a NUL character")
            if _SURROGATE.search(item):
                raise ValueError("a lone surrogate (half a UTF-16 pair)")
        elif isinstance(item, dict):
            pending += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            pending += item
