"""Suggest the setting that a misspelt or guessed key stands for."""

import re
from collections.abc import Iterable, Mapping
from difflib import SequenceMatcher, get_close_matches

_MIN_DESCRIBED = 4  # characters of a key that is looked up in the descriptions
_MAX_SUGGESTIONS = 3


def did_you_mean(names: Iterable[str]) -> str:
    """Return "; did you mean A or B?", or nothing without names."""
    listed = " or ".join(names)
    return f"; did you mean {listed}?" if listed else ""


def closest(name: str, known: Iterable[str]) -> list[str]:
    """Return the name that is spelled most like `name`, or nothing."""
    return get_close_matches(name, list(known), n=1)


def similar_settings(key: str, descriptions: Mapping[str, str]) -> list[str]:
    """Return the settings that `key` may stand for, at most three.

    descriptions: those of all settings, by dotted key. The last part of `key` counts first. So
    optimizer.learning_rate is optim.lr, which is described as a learning rate, and not optim.name,
    whose key has more letters in common.
    """
    group, _, last = key.rpartition(".")
    if group in descriptions:  # a setting that has no parts
        return [group]
    same = [name for name in descriptions if _last(name) == last]
    if same and group:
        return [max(same, key=lambda name: SequenceMatcher(None, name, key).ratio())]
    if same:
        return same[:_MAX_SUGGESTIONS]
    if not group and (near := closest(key, [name.partition(".")[0] for name in descriptions])):
        return near
    in_group = [name for name in descriptions if name.rpartition(".")[0] == group]
    longer = [name for name in descriptions if _last(name).endswith(f"_{last}")]
    if 0 < len(longer) <= _MAX_SUGGESTIONS:
        return longer
    for names in (in_group, list(descriptions)):
        if near := closest(last, map(_last, names)):
            return [next(name for name in names if _last(name) == near[0])]
    return _described_as(last, descriptions)


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _described_as(words: str, descriptions: Mapping[str, str]) -> list[str]:
    """Return the setting whose description contains the words earliest, or nothing."""
    squeezed = _squeeze(words)
    if len(squeezed) < _MIN_DESCRIBED:
        return []
    positions = {name: _squeeze(text).find(squeezed) for name, text in descriptions.items()}
    found = [name for name, position in positions.items() if position >= 0]
    return sorted(found, key=positions.__getitem__)[:1]


def _squeeze(text: str) -> str:
    return re.sub(r"[\W_]", "", text.lower())
