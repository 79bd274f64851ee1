"""Recipes: TOML files that extend each other, changed by the command line, checked strictly."""

import difflib
import re
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from minimind.config.settings import Recipe, Role
from minimind.errors import ConfigError

COMMAND_LINE, FLAG = "command line", "flag"
_BECAUSE_OF_LORA = "because of lora"
_ADAPTER_LR = 1e-3  # as in lora-small


@dataclass(frozen=True)
class ResolvedRecipe:
    """A recipe, and where its settings came from: a file and line, the command line, or a flag."""

    recipe: Recipe
    origins: dict[str, str]  # by dotted key; what is not in it is a default


def load_recipe(
    name: str | Path | None,
    *,
    overrides: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> ResolvedRecipe:
    """Read a recipe; then `key=value` overrides, then flags (by dotted key) replace what it says.

    `name` is a file, or the name of a packaged recipe. Raises ConfigError that names the file,
    line and key of what is wrong.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if name is not None:
        values, origins = _read(find_recipe(str(name)), ())
    for argument in overrides:
        _replace(values, origins, *parse_override(argument), COMMAND_LINE)
    for key, value in (flags or {}).items():
        _replace(values, origins, key, value, FLAG)
    _drop_inherited_decay(values, origins, _from_command_line(origins))
    _optimize_adapters(values, origins)
    return ResolvedRecipe(_validate(values, origins), origins)


def packaged_recipes() -> dict[str, Path]:
    """The recipes that come with minimind, by name."""
    package = Path(str(resources.files("minimind")))
    # An installed package holds them; a checkout keeps them in sight, beside the package.
    folders = (package / "recipes", package.parent / "recipes")
    folder = next((folder for folder in folders if folder.is_dir()), folders[0])
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def find_recipe(name: str, beside: Path = Path()) -> Path:
    """The file that `name` means: one in `beside`, else a packaged recipe. Raises ConfigError."""
    path = beside / name
    if path.is_file():
        return path
    packaged = packaged_recipes()
    stem = name.removesuffix(".toml")
    if stem not in packaged:
        raise ConfigError(
            f"{path}: there is no such recipe{_nearest(stem, packaged)}; "
            f"minimind comes with {', '.join(packaged)}"
        )
    return packaged[stem]


def _read(path: Path, children: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of a recipe file and of those it extends, and where each one stands."""
    if path.resolve() in children:
        raise ConfigError(f"{path}: this recipe extends itself, by way of {children[-1]}")
    text = _text(path)
    values = _parse(path, text)
    lines = _key_lines(text)
    parent = values.pop("extends", None)
    origins = {key: f"{_shown(path)}:{_line(key, lines)}" for key in leaves(values)}
    if parent is None:
        return values, origins
    where = f"{_shown(path)}:{_line('extends', lines)}"
    if not isinstance(parent, str):
        raise ConfigError(f"{where}: extends = {toml_value(parent)} will not do: name one recipe")
    try:
        parent_path = find_recipe(parent, path.parent)
    except ConfigError as error:
        raise ConfigError(f"{where}: extends = {toml_value(parent)}: {error}") from None
    base, base_origins = _read(parent_path, (*children, path.resolve()))
    merged, merged_origins = _merged(base, values), base_origins | origins
    _drop_inherited_decay(merged, merged_origins, origins)
    return merged, merged_origins


def _drop_inherited_decay(
    values: dict[str, Any], origins: dict[str, str], said: Collection[str]
) -> None:
    """Drop the decay of an inherited WSD schedule where `said`, the keys of a recipe that extends
    it or of the command line, chooses cosine and says nothing of decay."""
    schedule = values.get("schedule")
    if not isinstance(schedule, dict) or schedule.get("name") != "cosine":
        return
    if "schedule.name" in said and "schedule.decay" not in said:
        schedule.pop("decay", None)
        origins.pop("schedule.decay", None)


def _from_command_line(origins: Mapping[str, str]) -> set[str]:
    return {key for key, origin in origins.items() if origin in (COMMAND_LINE, FLAG)}


def _shown(path: Path) -> str:
    """A packaged recipe by its short name: where it is installed is of no use to a reader."""
    return path.name if path in packaged_recipes().values() else str(path)


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from None


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message = str(error)
        place = re.search(r" \(at line (\d+), column \d+\)$", message)
        line = int(place[1]) if place else len(text.splitlines())
        raise ConfigError(f"{path}:{line}: not TOML: {message}") from None


def _key_lines(text: str) -> dict[str, int]:
    """The line on which each table and dotted key of a TOML text first stands."""
    lines: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        if head := re.match(r"\s*\[+\s*([^\[\]#]+?)\s*\]+\s*(#|$)", line):
            table = _bare(head[1]) + "."
            lines.setdefault(table[:-1], number)
        elif key := re.match(r"\s*([\w.\"' -]+?)\s*=", line):
            lines.setdefault(table + _bare(key[1]), number)
    return lines


def _bare(key: str) -> str:
    return re.sub(r"[\s\"']", "", key)


def _line(key: str, lines: Mapping[str, int]) -> int:
    """Where the key, or the inline table around it, stands."""
    while key not in lines and "." in key:
        key = key.rpartition(".")[0]
    return lines.get(key, 1)


def leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys; lists and empty tables are leaves."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= leaves(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with what `over` says; tables are merged, all else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merged(base[key], value) if both else value
    return merged


def parse_override(argument: str) -> tuple[str, Any]:
    """`key=value`, the value as TOML writes it; a bare word is a string."""
    key, equals, text = argument.partition("=")
    if not key.strip() or not equals:
        raise ConfigError(
            f"{COMMAND_LINE}: {argument!r} should be KEY=VALUE, such as optim.lr=3e-4"
        )
    try:
        return key.strip(), tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), text


def _replace(
    values: dict[str, Any], origins: dict[str, str], key: str, value: Any, origin: str
) -> None:
    *tables, last = key.split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{origin}: {_unknown(key)}")
    values[last] = value
    for old in [name for name in origins if f"{name}.".startswith(f"{key}.")]:
        del origins[old]
    origins[key] = origin


def _optimize_adapters(values: dict[str, Any], origins: dict[str, str]) -> None:
    """Adapters that the command line asks for, in a recipe of Muon, take AdamW and its rate.

    So a setting such as lora.rank=8 is enough; what the command line says of optim stands.
    """
    said = _from_command_line(origins)
    optim = values.get("optim", {})
    if not any(f"{key}.".startswith("lora.") for key in said) or not isinstance(optim, dict):
        return
    if optim.get("name", "muon") == "muon" and not {"optim", "optim.name"} & said:
        for key, value in (("optim.name", "adamw"), ("optim.lr", _ADAPTER_LR)):
            if key not in said:
                _replace(values, origins, key, value, _BECAUSE_OF_LORA)


def _validate(values: dict[str, Any], origins: dict[str, str]) -> Recipe:
    try:
        recipe = Recipe(**values)
    except ValidationError as error:
        raise ConfigError(_complaint(error, origins)) from None
    try:
        recipe.model.shape(vocab_size=1)  # whether the parts of the shape fit together
    except ValidationError as error:
        raise ConfigError(_complaint(error, origins, ("model",))) from None
    return recipe


def _complaint(
    error: ValidationError, origins: Mapping[str, str], within: tuple[str, ...] = ()
) -> str:
    """One line for each thing that is wrong."""
    lines = []
    for wrong in error.errors():
        key = ".".join(str(part) for part in (*within, *wrong["loc"]))
        where = _origin(key, origins)
        what = wrong["msg"].removeprefix("Value error, ").replace("Input should", "it should")
        if wrong["type"] == "model_type":
            what = "it should be a group of settings (a table)"
        if wrong["type"] == "extra_forbidden":
            lines.append(f"{where}{_unknown(key)}")
        elif wrong["type"] == "missing":
            lines.append(f"{where}{key} is not set; put it into the recipe, or give {key}=…")
        elif wrong["type"] == "value_error" and isinstance(wrong["input"], dict | BaseModel):
            lines.append(f"{where}{key}: {what}")  # a contradiction between several settings
        else:
            lines.append(f"{where}{key} = {toml_value(wrong['input'])} will not do: {what}")
    return "\n".join(lines)


def _origin(key: str, origins: Mapping[str, str]) -> str:
    """Where the setting, or else the nearest one within or around it, was given."""
    while key:
        within = [where for name, where in origins.items() if f"{name}.".startswith(f"{key}.")]
        if within:
            return f"{within[-1]}: "  # the last word: a change upset what fitted before
        key = key.rpartition(".")[0]
    return ""


def _unknown(key: str) -> str:
    names = setting_names()
    groups = dict.fromkeys(name.partition(".")[0] for name in names)
    hint = _nearest(key, [*names, *groups]) or "; --explain lists all settings"
    return f"{key} is not a setting{hint}"


def _nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean …?`, or nothing."""
    names = list(known)
    close = [full for full in names if full.endswith(f".{name}")]  # the group left out
    close = close or difflib.get_close_matches(name, names, n=1)
    if not close:  # the right name, or nearly, in the wrong group
        by_last = {name.rpartition(".")[2]: name for name in reversed(names)}
        close = difflib.get_close_matches(name.rpartition(".")[2], by_last, n=1)
        close = [by_last[last] for last in close]
    return f"; did you mean {close[0]}?" if close else ""


def setting_names() -> list[str]:
    """Every dotted key that a recipe may set."""
    return list(setting_roles())


@cache
def setting_roles() -> dict[str, Role]:
    """The role of each setting, by dotted key."""
    return _roles(Recipe)


def _roles(model: type[BaseModel], prefix: str = "") -> dict[str, Role]:
    roles: dict[str, Role] = {}
    for name, field in model.model_fields.items():
        kinds = (field.annotation, *get_args(field.annotation))
        inner = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
        if inner:
            roles |= _roles(inner, f"{prefix}{name}.")
        else:
            [roles[prefix + name]] = (mark for mark in field.metadata if isinstance(mark, Role))
    return roles


def difference(kept: Recipe, given: Recipe) -> dict[str, str]:
    """The settings in which a run's recipe and the one now given differ, as text by dotted key."""
    before, now = leaves(kept.model_dump()), leaves(given.model_dump())
    return {
        key: f"{key} was {_told(before.get(key))} and is now {_told(now.get(key))}"
        for key in before | now
        if before.get(key) != now.get(key)
    }


def role_of(key: str) -> Role:
    """The role of a setting or of an entry in one; a group that is absent counts as identity."""
    roles = setting_roles()
    while key not in roles and "." in key:
        key = key.rpartition(".")[0]
    return roles.get(key, Role.IDENTITY)


def identity(recipe: Recipe) -> dict[str, Any]:
    """The settings that decide what the run computes, by dotted key."""
    values = leaves(recipe.model_dump())
    return {key: value for key, value in values.items() if role_of(key) is Role.IDENTITY}


def _told(value: Any) -> str:
    return "not set" if value is None else toml_value(value)


def dump_recipe(recipe: Recipe) -> str:
    """TOML text that loads as an equal recipe; settings that are None are left out."""
    values = recipe.model_dump(exclude_none=True)
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    lines = [f"{key} = {toml_value(value)}" for key, value in values.items() if key not in tables]
    for name, table in tables.items():
        lines += ["", f"[{name}]"]
        lines += [f"{key} = {toml_value(value)}" for key, value in table.items()]
    return "\n".join(lines) + "\n"


def toml_value(value: Any) -> str:
    """A value as TOML writes it, on one line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return '"' + "".join(map(_escaped, value)) + '"'
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml_key(k)} = {toml_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    return str(value)  # a date, which no setting is, but which a recipe may hold by mistake


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else toml_value(key)


def _escaped(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    return character if character.isprintable() else f"\\U{ord(character):08x}"
