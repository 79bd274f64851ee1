"""Table of all settings, their values and origins, for `--explain`."""

from typing import Any

from rich.table import Table
from rich.text import Text

from minimind.config.load import ResolvedRecipe, setting_names, toml_value


def explain(resolved: ResolvedRecipe) -> Table:
    """Return a table of every setting, its value and its origin; defaults are dimmed."""
    table = Table("setting", "value", "from", box=None, pad_edge=False)
    table.columns[0].no_wrap = True
    table.columns[2].overflow = "fold"
    values = resolved.recipe.model_dump()
    for key in setting_names():
        value: Any = values
        for part in key.split("."):
            value = None if value is None else value[part]  # an optional table that is not set
        origin = _origin(key, resolved.origins)
        row = (key, "" if value is None else toml_value(value), origin or "default")
        table.add_row(*map(Text, row), style=None if origin else "dim")
    return table


def _origin(key: str, origins: dict[str, str]) -> str | None:
    """Return where a setting, an entry of it, or the group that contains it was set."""
    within = [where for name, where in origins.items() if name.startswith(f"{key}.")]
    if within:
        return within[-1]
    while key not in origins and "." in key:
        key = key.rpartition(".")[0]
    return origins.get(key)
