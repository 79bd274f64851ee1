"""Load recipes: TOML files with inheritance, overrides from the command line, strict validation."""

import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from minimind.config.roles import Role
from minimind.config.settings import Recipe
from minimind.config.suggest import closest, did_you_mean, similar_settings
from minimind.errors import ConfigError

COMMAND_LINE, FLAG = "command line", "flag"  # origins of settings, besides files
_LORA_DEFAULT = "default with lora"
_Settings = TypeVar("_Settings", bound=BaseModel)
# AdamW's rate for adapters, which is higher than for all weights: only they train. That of
# lora-small.toml, and ten times that of dpo-small.toml, the ratio in trl's examples of DPO.
_ADAPTER_LR, _DPO_ADAPTER_LR = 1e-3, 5e-4


@dataclass(frozen=True)
class ResolvedRecipe:
    """A recipe and the origins of its settings: file and line, command line, or flag."""

    recipe: Recipe
    origins: dict[str, str]  # by dotted key; defaults are absent


def load_recipe(
    name: str | Path | None,
    *,
    overrides: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> ResolvedRecipe:
    """Load a recipe file or a packaged recipe; apply `key=value` overrides, then flags.

    flags: values by dotted key. Raises ConfigError with the file, line and key of each mistake.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if name is not None:
        values, origins = _read(find_recipe(str(name)), ())
    given: dict[str, Any] = {}
    for argument in overrides:
        key, value = parse_override(argument)
        _set(values, origins, key, value, COMMAND_LINE)
        given |= leaves({key: value})
    for key, value in (flags or {}).items():
        if key in given:
            raise ConfigError(
                f"{COMMAND_LINE}: {key} is also set by the command or by an option; leave it out"
            )
        if key == "objective" and (other := values.get(key, value)) != value:
            raise ConfigError(
                f"{origins[key]}: the recipe has the objective {other}; use `minimind {other}`, or "
                "another recipe"
            )
        _set(values, origins, key, value, FLAG)
    _drop_replaced(values, origins, _from_command_line(origins))
    _use_adamw_for_lora(values, origins)
    return ResolvedRecipe(_validate(values, origins), origins)


def load_settings(
    kind: type[_Settings], name: str, group: str, *, overrides: Sequence[str] = ()
) -> _Settings:
    """Load the settings of a task other than training, with `key=value` overrides.

    group: the subfolder of the packaged recipes of this task. Raises ConfigError as `load_recipe`.
    """
    values, origins = _read(find_recipe(name, group=group), (), group)
    for argument in overrides:
        _set(values, origins, *parse_override(argument), COMMAND_LINE)
    try:
        return kind(**values)
    except ValidationError as error:
        names = _field_names(kind)
        raise ConfigError(_format_errors(error, origins, names=names)) from None


def _field_names(kind: type[BaseModel], prefix: str = "") -> list[str]:
    """Return the dotted keys of all fields of nested settings."""
    names: list[str] = []
    for name, field in kind.model_fields.items():
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            names += _field_names(nested, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


@cache
def packaged_recipes(group: str = "") -> dict[str, Path]:
    """Return the files of the recipes that come with minimind, by name.

    group: a subfolder, "prepare" for data preparation or "roads"; default: the recipes of training
    runs.
    """
    package = Path(str(resources.files("minimind")))
    # An installed package contains them; in a checkout they are in the repository root.
    folders = (package / "recipes", package.parent / "recipes")
    folder = next((folder for folder in folders if folder.is_dir()), folders[0])
    return {path.stem: path for path in sorted((folder / group).glob("*.toml"))}


def find_recipe(name: str, directory: Path = Path(), group: str = "") -> Path:
    """Return the recipe file `name` in `directory`, else the packaged recipe of that name.

    Raises ConfigError when there is neither.
    """
    path = directory / name
    if path.is_file():
        return path
    packaged = packaged_recipes(group)
    stem = name.removesuffix(".toml")
    if stem not in packaged:
        kind = "road" if group == "roads" else "recipe"
        raise ConfigError(
            f"{path}: there is no such {kind}{did_you_mean(closest(stem, packaged))}; "
            f"minimind comes with {', '.join(packaged)}"
        )
    return packaged[stem]


def _read(
    path: Path, children: tuple[Path, ...], group: str = ""
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the values of a recipe file, merged with those it extends, and their origins."""
    if path.resolve() in children:
        raise ConfigError(f"{path}: this recipe extends itself through {children[-1]}")
    text = _read_text(path)
    values = _parse(path, text, group)
    lines = _key_lines(text)
    parent = values.pop("extends", None)
    origins = {key: f"{_short_path(path)}:{_line(key, lines)}" for key in leaves(values)}
    if parent is None:
        return values, origins
    where = f"{_short_path(path)}:{_line('extends', lines)}"
    if not isinstance(parent, str):
        raise ConfigError(
            f"{where}: extends = {toml_value(parent)}: must be the name of one recipe"
        )
    try:
        parent_path = find_recipe(parent, path.parent, group)
    except ConfigError as error:
        raise ConfigError(f"{where}: extends = {toml_value(parent)}: {error}") from None
    base, base_origins = _read(parent_path, (*children, path.resolve()), group)
    merged = _merge(base, values)
    # In the order of the changes: `_origin` names the last one.
    merged_origins = {key: where for key, where in base_origins.items() if key not in origins}
    merged_origins |= origins
    _drop_replaced(merged, merged_origins, origins)
    return merged, merged_origins


def _drop_replaced(values: dict[str, Any], origins: dict[str, str], keys: Collection[str]) -> None:
    """Drop inherited settings that other settings replace.

    These are the decay of a WSD schedule when cosine is chosen, the number of steps when the number
    of epochs is given, and the preset of a packaged recipe when a model is given. keys: settings of
    the extending recipe or the command line. What they set is kept, and validation decides.
    """
    replaced: list[str] = []
    schedule, model = values.get("schedule"), values.get("model")
    if "schedule.name" in keys and isinstance(schedule, dict) and schedule.get("name") == "cosine":
        replaced.append("schedule.decay")
    if "training.epochs" in keys:
        replaced.append("training.steps")
    is_packaged = origins.get("model.preset", "").partition(":")[0] in _packaged_names()
    if "model.init" in keys and isinstance(model, dict) and model.get("init") and is_packaged:
        replaced.append("model.preset")
    for table, _, name in (key.partition(".") for key in replaced if key not in keys):
        if isinstance(values.get(table), dict):
            values[table].pop(name, None)
            origins.pop(f"{table}.{name}", None)


def _from_command_line(origins: Mapping[str, str]) -> set[str]:
    return {key for key, origin in origins.items() if origin in (COMMAND_LINE, FLAG)}


def _packaged_names() -> set[str]:
    return {path.name for path in packaged_recipes().values()}


def _short_path(path: Path) -> str:
    """Return the path for messages; of a packaged recipe only the file name."""
    return path.name if path in packaged_recipes().values() else str(path)


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from None


def _parse(path: Path, text: str, group: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ConfigError(f"{path}: its values are nested too deeply") from None
    except ValueError as error:  # not only TOMLDecodeError: an integer of 5,000 digits
        message = str(error)
        position = re.search(r" \(at line (\d+), column \d+\)$", message)
        line = int(position[1]) if position else len(text.splitlines())
        # Only commands that train take data with --data.
        takes_data = path.suffix != ".toml" and not group
        advice = ". If it is data, give it with --data" if takes_data else ""
        raise ConfigError(f"{path}:{line}: not TOML: {message}{advice}") from None


def _key_lines(text: str) -> dict[str, int]:
    """Return the number of the line on which each table and dotted key first appears."""
    lines: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[+\s*([^\[\]#]+?)\s*\]+\s*(#|$)", line):
            table = _without_quotes(header[1]) + "."
            lines.setdefault(table[:-1], number)
        elif key := re.match(r"\s*([\w.\"' -]+?)\s*=", line):
            lines.setdefault(table + _without_quotes(key[1]), number)
    return lines


def _without_quotes(key: str) -> str:
    return re.sub(r"[\s\"']", "", key)


def _line(key: str, lines: Mapping[str, int]) -> int:
    """Return the line number of a key, or of the inline table that contains it."""
    while key not in lines and "." in key:
        key = key.rpartition(".")[0]
    return lines.get(key, 1)


def leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested tables to dotted keys; lists and empty tables are values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= leaves(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `changes`; tables are merged, other values replaced."""
    merged = dict(base)
    for key, value in changes.items():
        are_tables = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if are_tables else value
    return merged


def parse_override(argument: str) -> tuple[str, Any]:
    """Parse `key=value`. The value is TOML; what is not valid TOML is a string."""
    key, equals, text = argument.partition("=")
    if not key.strip() or not equals:
        raise ConfigError(
            f"{COMMAND_LINE}: {argument!r} is not of the form KEY=VALUE, such as optim.lr=3e-4"
        )
    try:
        return key.strip(), tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # not only TOMLDecodeError, see `_parse`
        return key.strip(), text


def _set(
    values: dict[str, Any], origins: dict[str, str], key: str, value: Any, origin: str
) -> None:
    """Set a value by its dotted key, and its origin."""
    *tables, last = key.split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{origin}: {_unknown_setting(key)}")
    values[last] = value
    for old in [name for name in origins if f"{name}.".startswith(f"{key}.")]:
        del origins[old]
    origins[key] = origin


def _use_adamw_for_lora(values: dict[str, Any], origins: dict[str, str]) -> None:
    """Set AdamW and its learning rate if the command line adds LoRA to a recipe with Muon.

    So the option `lora.rank=8` needs no others. Settings of optim on the command line take
    precedence.
    """
    keys = _from_command_line(origins)
    optim = values.get("optim", {})
    if not any(f"{key}.".startswith("lora.") for key in keys) or not isinstance(optim, dict):
        return
    if optim.get("name", "muon") == "muon" and not {"optim", "optim.name"} & keys:
        lr = _DPO_ADAPTER_LR if values.get("objective") == "dpo" else _ADAPTER_LR
        for key, value in (("optim.name", "adamw"), ("optim.lr", lr)):
            if key not in keys:
                _set(values, origins, key, value, _LORA_DEFAULT)


def _validate(values: dict[str, Any], origins: dict[str, str]) -> Recipe:
    try:
        recipe = Recipe(**values)
    except ValidationError as error:
        raise ConfigError(_format_errors(error, origins)) from None
    try:
        recipe.model.shape(vocab_size=1)  # validates the combination
    except ValidationError as error:
        raise ConfigError(_format_errors(error, origins, ("model",))) from None
    return recipe


def _format_errors(
    error: ValidationError,
    origins: Mapping[str, str],
    prefix: tuple[str, ...] = (),
    names: Sequence[str] | None = None,
) -> str:
    """Format each error as a line with its origin, key and value.

    names: the settings that exist; default: those of a training run.
    """
    lines = []
    for details in error.errors():
        key = ".".join(str(part) for part in (*prefix, *details["loc"]))
        where = _origin(key, origins)
        reason = details["msg"].removeprefix("Value error, ")
        reason = re.sub("^Input should", "must", reason)
        if details["type"] == "model_type":
            reason = "must be a group of settings (a table)"
        if details["type"] == "extra_forbidden":
            lines.append(f"{where}{_unknown_setting(key, names)}")
        elif details["type"] == "missing":
            lines.append(f"{where}{key} is not set; set it in the recipe, or give {key}=…")
        elif details["type"] == "value_error" and isinstance(details["input"], dict | BaseModel):
            lines.append(f"{where}{key}: {reason}")  # several settings contradict each other
        else:
            value = toml_value(details["input"])
            if written := _as_expected(details["type"], details["input"]):
                on_command_line = where == f"{COMMAND_LINE}: "
                reason += f"; write {key}='{written}'" if on_command_line else f"; write {written}"
            lines.append(f"{where}{key} = {value}: {reason}")
    return "\n".join(lines)


def _as_expected(error: str, value: object) -> str | None:
    """Return the TOML of a number as the string, or a string as the list, that is expected."""
    if error == "string_type" and isinstance(value, int | float):
        return toml_value(toml_value(value))
    if error == "list_type" and isinstance(value, str):
        return toml_value([value])
    return None


def _origin(key: str, origins: Mapping[str, str]) -> str:
    """Return where a setting, an entry of it, or the group that contains it was set."""
    while key:
        within = [where for name, where in origins.items() if f"{name}.".startswith(f"{key}.")]
        if within:
            return f"{within[-1]}: "  # the last change, which caused the error
        key = key.rpartition(".")[0]
    return ""


def _unknown_setting(key: str, settings: Sequence[str] | None = None) -> str:
    descriptions = dict.fromkeys(settings, "") if settings else setting_descriptions()
    listed = f"settings are {', '.join(settings)}" if settings else "--explain lists all settings"
    hint = did_you_mean(similar_settings(key, descriptions))
    return f"{key} is not a setting{hint or '; ' + listed}"


def setting_names() -> list[str]:
    """Return the dotted keys of all settings."""
    return list(setting_roles())


@cache
def setting_roles() -> dict[str, Role]:
    """Return the role of each setting, by dotted key."""
    roles: dict[str, Role] = {}
    for name, field in _setting_fields().items():
        [roles[name]] = (mark for mark in field.metadata if isinstance(mark, Role))
    return roles


def setting_descriptions() -> dict[str, str]:
    """Return the description of each setting, by dotted key."""
    return {name: field.description or "" for name, field in _setting_fields().items()}


@cache
def _setting_fields() -> dict[str, FieldInfo]:
    return _fields(Recipe)


def _fields(model: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Return the fields of a model and of the models in it, by dotted key."""
    fields: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        kinds = (field.annotation, *get_args(field.annotation))
        table = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
        fields |= _fields(table, f"{prefix}{name}.") if table else {prefix + name: field}
    return fields


def difference(old: Recipe, new: Recipe) -> dict[str, str]:
    """Return the settings in which two recipes differ, described as text, by dotted key."""
    before, now = leaves(old.model_dump()), leaves(new.model_dump())
    return {
        key: f"{key} was {_value_text(before.get(key))} and is now {_value_text(now.get(key))}"
        for key in before | now
        if before.get(key) != now.get(key)
    }


def role_of(key: str) -> Role:
    """Return the role of a setting or of an entry in it; identity for a group that is None."""
    roles = setting_roles()
    while key not in roles and "." in key:
        key = key.rpartition(".")[0]
    return roles.get(key, Role.IDENTITY)


def identity(recipe: Recipe) -> dict[str, Any]:
    """Return the settings that determine the result of a run, by dotted key."""
    values = leaves(recipe.model_dump())
    return {key: value for key, value in values.items() if role_of(key) is Role.IDENTITY}


def _value_text(value: Any) -> str:
    return "not set" if value is None else toml_value(value)


def dump_recipe(recipe: Recipe) -> str:
    """Return TOML text that loads as an equal recipe; settings that are None are left out."""
    values = recipe.model_dump(exclude_none=True)
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    lines = [f"{key} = {toml_value(value)}" for key, value in values.items() if key not in tables]
    for name, table in tables.items():
        lines += ["", f"[{name}]"]
        lines += [f"{key} = {toml_value(value)}" for key, value in table.items()]
    text = "\n".join(lines) + "\n"
    if re.search(r"\\U0000d[89a-f]", text):  # a byte of a name that is not UTF-8
        raise ConfigError("a name in the recipe is not UTF-8; rename the file or folder")
    return text


def toml_value(value: Any) -> str:
    """Format a value as TOML, on one line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return '"' + "".join(map(_escape, value)) + '"'
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml_key(k)} = {toml_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    return str(value)  # a date, which only an invalid recipe contains


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else toml_value(key)


def _escape(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    return character if character.isprintable() else f"\\U{ord(character):08x}"
