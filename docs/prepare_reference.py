"""Generate the reference page of the settings of `minimind data prepare`.

The meaning of a setting is its description in the code; its value and the reason for it are those
of `recipes/prepare/zh.toml`, where each reason is the comment of its line.
"""

import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from minimind.data.prepare.settings import PrepareSettings

_RECIPE = Path(__file__).parents[1] / "recipes" / "prepare" / "zh.toml"
_SECTION = re.compile(r"\[(\w+)\]")
_VALUE = re.compile(r"(\w+) = [^#]*#\s*(.+)")
_TITLE = {"en": "Preparation settings", "zh": "数据预处理设置"}
_INTRODUCTION = {
    "en": "Settings of [`minimind data prepare`](../guides/preparation.md), with the values of the "
    "packaged recipe `zh` and their reasons. `KEY=VALUE` on the command line changes one. All of "
    "them determine the output, so none may change when a preparation is continued. A threshold "
    "is a share from 0 to 1 unless its unit is given.",
    "zh": "[`minimind data prepare`](../guides/preparation.md) 的设置，"
    "以及自带配方 `zh` 的取值和理由。"
    "在命令行用 `KEY=VALUE` 修改。所有设置都影响输出，因此继续中断的处理时都不能改变。"
    "除注明单位的以外，阈值都是 0 到 1 之间的比例。",
}
_HEAD = {
    "en": "| setting | value | meaning | reason for the value |",
    "zh": "| 设置 | 取值 | 含义 | 取值的理由 |",
}
_LIST = {"en": "{} phrases", "zh": "{} 个短语"}


def prepare_page(lang: str, note: str, translations: Mapping[str, list[str]]) -> str:
    """Return the page. translations: Chinese meaning and reason of each setting."""
    values = tomllib.loads(_RECIPE.read_text("utf-8"))
    reasons = dict(_reasons())
    fields = dict(_descriptions(PrepareSettings))
    for what, keys in {"translations": translations.keys(), "reasons": reasons.keys()}.items():
        if keys != fields.keys():
            raise ValueError(f"{what} of {sorted(keys ^ fields.keys())} are missing or left over")
    lines = [f"# {_TITLE[lang]}", "", note, "", _INTRODUCTION[lang], ""]
    section = None
    for key, meaning in fields.items():
        name = key.rpartition(".")[0]
        if name != section:
            section = name
            heading = f"`[{name}]`" if name else {"en": "Top level", "zh": "顶层设置"}[lang]
            lines += [""] * bool(lines[-1]) + [
                f"## {heading}",
                "",
                _HEAD[lang],
                "|---|---|---|---|",
            ]
        texts = translations[key] if lang == "zh" else [meaning, _sentence(reasons[key])]
        cells = [f"`{key}`", _value(values, key, lang), *texts]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _reasons() -> Iterator[tuple[str, str]]:
    """Yield the dotted key of each value of the recipe, and the comment of its line."""
    prefix = ""
    for line in _RECIPE.read_text("utf-8").splitlines():
        if section := _SECTION.match(line):
            prefix = f"{section[1]}."
        elif value := _VALUE.match(line):
            yield prefix + value[1], value[2]


def _descriptions(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted key and the description of each setting; tables come last, as in TOML."""
    for name, field in model.model_fields.items():
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            yield from _descriptions(nested, f"{name}.")
        else:
            yield prefix + name, field.description or ""


def _value(values: Mapping[str, Any], key: str, lang: str) -> str:
    *tables, name = key.split(".")
    for table in tables:
        values = values[table]
    value = values[name]
    return _LIST[lang].format(len(value)) if isinstance(value, list) else f"`{value:_}`"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
