"""Variants of a recipe: settings with several values, `key=a,b,c`, and all their combinations.

Values are those of any override, as TOML writes them, separated by commas outside of brackets and
quotes; a path that exists is one value, whatever its name. So `data.seq_len=64,128` gives two
variants, `validation.prompts=["a", "b"]` one, and
`model={hidden_size = 256, num_hidden_layers = 2},{hidden_size = 128, num_hidden_layers = 8}`
two in which several settings change together (the braces hold the whole [model] of a recipe).
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

_PARTS = re.compile(
    r""" "(?:\\.|[^"\\])*" | '[^']*' | [\[{] | [\]}] | , | [^"'\[\]{},]+ | . """, re.X | re.S
)


@dataclass(frozen=True)
class Variant:
    """One combination. `settings`: what tells it from the others, by dotted key; `name`: so much
    of that as is needed, fit to name a folder."""

    name: str
    settings: dict[str, Any]
    overrides: list[str]


def split_values(text: str) -> list[str]:
    """The values of `a,b,c`: parted by commas that stand outside of brackets and quotes."""
    values, depth = [""], 0
    for part in _PARTS.findall(text):
        depth += (part in ("[", "{")) - (part in ("]", "}"))
        if part == "," and depth <= 0:
            values.append("")
        else:
            values[-1] += part
    return [value.strip() for value in values]


def variants(overrides: Sequence[str]) -> list[Variant]:
    """All combinations of the values of `overrides`, the last setting changing fastest.

    Raises ConfigError for a value that is empty or given twice.
    """
    axes: list[list[str]] = []
    for override in overrides:
        key, _, text = override.partition("=")
        values = [text] if os.path.exists(text) else split_values(text)
        if len(values) > 1 and not all(values):
            raise ConfigError(f"{override}: a value is missing beside a comma")
        if len(set(values)) < len(values):
            raise ConfigError(f"{override}: a value is given twice")
        axes.append([f"{key}={value}" for value in values])
    keys = [override.partition("=")[0].strip() for override in overrides]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise ConfigError(f"{min(twice)} is given twice; give all its values at once: key=a,b,c")
    combinations = [list(combination) for combination in itertools.product(*axes)]
    told = [_settings(combination) for combination in combinations]
    varied = [
        key
        for key in dict.fromkeys(key for settings in told for key in settings)
        if len({toml_value(settings.get(key)) for settings in told}) > 1
    ]
    needed = _needed(told, varied)
    names = [_name({key: settings.get(key) for key in needed}) for settings in told]
    return [
        Variant(name, {key: settings.get(key) for key in varied}, combination)
        for name, settings, combination in zip(_distinct(names), told, combinations, strict=True)
    ]


def _distinct(names: Sequence[str]) -> list[str]:
    """Number the names that come several times; upper and lower case may be one directory."""
    times = Counter(name.casefold() for name in names)
    taken = {name for name, count in times.items() if count == 1}
    distinct = []
    for place, name in enumerate(names, 1):
        numbered = (f"{name}-{number}" for number in itertools.count(place))
        chosen = (
            name
            if times[name.casefold()] == 1
            else next(candidate for candidate in numbered if candidate.casefold() not in taken)
        )
        taken.add(chosen.casefold())
        distinct.append(chosen)
    return distinct


def _settings(combination: Sequence[str]) -> dict[str, Any]:
    """What a combination sets, by dotted key; tables by what is in them."""
    given: dict[str, Any] = {}
    for override in combination:
        key, value = parse_override(override)
        given |= leaves({key: value})
    return given


def _needed(told: Sequence[Mapping[str, Any]], varied: Sequence[str]) -> list[str]:
    """The first of the settings that vary which suffice to tell all variants apart."""
    needed: list[str] = []
    groups = 1
    for key in varied:
        distinct = {str([settings.get(k) for k in (*needed, key)]) for settings in told}
        if len(distinct) > groups:
            needed.append(key)
            groups = len(distinct)
    return needed


def _name(settings: Mapping[str, Any]) -> str:
    lasts = [key.rpartition(".")[2] for key in settings]
    parts = []
    for key, value in settings.items():
        last = key.rpartition(".")[2]
        told = value if isinstance(value, str) else toml_value(value)
        parts.append(f"{last if lasts.count(last) == 1 else key}-{told}")
    name = re.sub(r"[^\w.-]+", "-", "-".join(parts)).strip("-.")
    return name[:80] or "variant"
