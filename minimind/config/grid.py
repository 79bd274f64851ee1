"""Grid of variants of a recipe: all combinations of settings with several values, `key=a,b,c`.

Commas outside of brackets and quotes separate values. A path that exists is one value. Examples:

    data.seq_len=64,128               two variants
    validation.prompts=["a", "b"]     one variant: the value is a list
    model={hidden_size = 256, num_hidden_layers = 2},{hidden_size = 128, num_hidden_layers = 8}
                                      two variants; each table replaces [model] of the recipe
"""

import itertools
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minimind.config.load import leaves, parse_override, toml_value
from minimind.errors import ConfigError

_PIECES = re.compile(
    r""" "(?:\\.|[^"\\])*" | '[^']*' | [\[{] | [\]}] | , | [^"'\[\]{},]+ | . """, re.X | re.S
)


@dataclass(frozen=True)
class Variant:
    """One combination of values.

    name: valid as a directory name. settings: values of the settings that vary, by dotted key.
    """

    name: str
    settings: dict[str, Any]
    overrides: list[str]


def split_values(text: str) -> list[str]:
    """Split `a,b,c` at commas outside of brackets and quotes."""
    values, depth = [""], 0
    for piece in _PIECES.findall(text):
        depth += (piece in ("[", "{")) - (piece in ("]", "}"))
        if piece == "," and depth <= 0:
            values.append("")
        else:
            values[-1] += piece
    return [value.strip() for value in values]


def variants(overrides: Sequence[str]) -> list[Variant]:
    """Return all combinations of the values of `overrides`; the last setting changes fastest.

    Raises ConfigError for empty and duplicate values and for duplicate settings.
    """
    axes: list[list[str]] = []
    for override in overrides:
        key, _, text = override.partition("=")
        values = [text] if os.path.exists(text) else split_values(text)
        if len(values) > 1 and not all(values):
            raise ConfigError(f"{override}: a value is missing before or after a comma")
        if len(set(values)) < len(values):
            raise ConfigError(f"{override}: the same value is given twice")
        axes.append([f"{key}={value}" for value in values])
    keys = [override.partition("=")[0].strip() for override in overrides]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise ConfigError(f"{min(twice)} is given twice; give all its values together: key=a,b,c")
    combinations = [list(combination) for combination in itertools.product(*axes)]
    settings = [_settings(combination) for combination in combinations]
    varied = [
        key
        for key in dict.fromkeys(key for variant in settings for key in variant)
        if len({toml_value(variant.get(key)) for variant in settings}) > 1
    ]
    keys_in_name = _distinguishing_keys(settings, varied)
    names = [_variant_name({key: variant.get(key) for key in keys_in_name}) for variant in settings]
    return [
        Variant(name, {key: variant.get(key) for key in varied}, combination)
        for name, variant, combination in zip(
            _number_duplicates(names), settings, combinations, strict=True
        )
    ]


def _number_duplicates(names: Sequence[str]) -> list[str]:
    """Append numbers to duplicate names; case is ignored, as on some file systems."""
    counts = Counter(name.casefold() for name in names)
    taken = {name for name, count in counts.items() if count == 1}
    distinct = []
    for index, name in enumerate(names, 1):
        numbered = (f"{name}-{number}" for number in itertools.count(index))
        distinct_name = (
            name
            if counts[name.casefold()] == 1
            else next(candidate for candidate in numbered if candidate.casefold() not in taken)
        )
        taken.add(distinct_name.casefold())
        distinct.append(distinct_name)
    return distinct


def _settings(combination: Sequence[str]) -> dict[str, Any]:
    """Return the settings of a combination, by dotted key; tables are flattened."""
    settings: dict[str, Any] = {}
    for override in combination:
        key, value = parse_override(override)
        settings |= leaves({key: value})
    return settings


def _distinguishing_keys(settings: Sequence[Mapping[str, Any]], varied: Sequence[str]) -> list[str]:
    """Return as many of the varied settings as are needed to tell all variants apart."""
    keys: list[str] = []
    num_groups = 1
    for key in varied:
        groups = {str([variant.get(k) for k in (*keys, key)]) for variant in settings}
        if len(groups) > num_groups:
            keys.append(key)
            num_groups = len(groups)
    return keys


def _variant_name(settings: Mapping[str, Any]) -> str:
    """Return a name such as `seq_len-64-lr-0.001`; ambiguous keys are written in full."""
    last_parts = [key.rpartition(".")[2] for key in settings]
    parts = []
    for key, value in settings.items():
        last = key.rpartition(".")[2]
        text = value if isinstance(value, str) else toml_value(value)
        parts.append(f"{last if last_parts.count(last) == 1 else key}-{text}")
    name = re.sub(r"[^\w.-]+", "-", "-".join(parts)).strip("-.")
    return name[:80] or "variant"
