"""Generate the HTTP API reference from the schema classes of the service.

Descriptions and differences from OpenAI stand in minimind/serving/{requests,schema,errors,limits,
metrics}.py in English. Their Chinese is in `docs/translations.toml`, section `http`, by the English
text: a changed text needs a changed translation.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from pydantic import BaseModel

from minimind.serving import schema
from minimind.serving.app import Service, create_app
from minimind.serving.differences import DIFFERENCE, SUPPORT
from minimind.serving.errors import ERROR_CODES
from minimind.serving.limits import Limits
from minimind.serving.metrics import Metrics
from minimind.serving.request_types import MAX_INT
from minimind.serving.requests import (
    UNSUPPORTED,
    ChatRequest,
    CompletionParameters,
    CompletionRequest,
    JsonSchema,
    Message,
    ResponseFormat,
    StreamOptions,
    TextPart,
)
from minimind.serving.streaming import PING_SECONDS

_TEMPLATES = Path(__file__).parent / "templates"
_OBJECTS = (Message, TextPart, StreamOptions, ResponseFormat, JsonSchema)
_HEADS = {
    "en": {
        "parameters": (
            "parameter", "type", "default", "support", "meaning", "difference from OpenAI",
        ),
        "endpoints": ("endpoint", "meaning"),
        "refused": ("parameter", "values without effect"),
        "responses": ("object", "field", "difference from OpenAI"),
        "errors": ("status", "code", "meaning"),
        "limits": ("limit", "default"),
        "metrics": ("metric", "type", "meaning"),
    },
    "zh": {
        "parameters": ("参数", "类型", "默认值", "支持情况", "含义", "与 OpenAI 的差别"),
        "endpoints": ("端点", "含义"),
        "refused": ("参数", "不起作用的取值"),
        "responses": ("对象", "字段", "与 OpenAI 的差别"),
        "errors": ("状态码", "错误代码", "含义"),
        "limits": ("上限", "默认值"),
        "metrics": ("指标", "类型", "含义"),
    },
}  # fmt: skip
_WORDS = {
    "en": {
        "array": "array of {}", "plural": "s", "bounds": " ({})", "items": "{} items", "or": " or ",
    },
    "zh": {
        "string": "字符串", "integer": "整数", "number": "数值", "boolean": "布尔值",
        "object": "对象", "array": "{}数组", "plural": "", "bounds": "（{}）", "items": "{} 项",
        "or": "或", "required": "必填", "yes": "支持", "no effect": "不起作用",
    },
}  # fmt: skip


def http_page(lang: str, note: str, translations: dict[str, str]) -> str:
    """Return the page in one language. Raises ValueError if a translation is missing or unused."""
    used: set[str] = set()

    def translate(text: str) -> str:
        used.add(text)
        return translations.get(text, "") if lang == "zh" else text

    tables = {name: _table(lang, name, rows) for name, rows in _tables(lang, translate).items()}
    missing, left_over = used - translations.keys(), translations.keys() - used
    if missing or left_over:
        raise ValueError(
            "docs/translations.toml, section http: "
            f"missing {sorted(missing)}, left over {sorted(left_over)}"
        )
    template = (_TEMPLATES / f"http.{lang}.md").read_text("utf-8")
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(template).render(
        tables, note=note, ping_seconds=f"{PING_SECONDS:g}"
    )


def _tables(lang: str, translate: Callable[[str], str]) -> dict[str, list[tuple[str, ...]]]:
    """Return the rows of each table by its name in the templates."""
    shared = CompletionParameters.model_fields.keys()
    return {
        "endpoints": [
            (f"`{method} {path}`", translate(meaning)) for method, path, meaning in _endpoints()
        ],
        "shared": list(_parameters(CompletionParameters, lang, translate)),
        "chat": list(_parameters(ChatRequest, lang, translate, without=shared)),
        "completion": list(_parameters(CompletionRequest, lang, translate, without=shared)),
        **{kind.__name__: list(_parameters(kind, lang, translate)) for kind in _OBJECTS},
        "refused": [
            (f"`{name}`", " · ".join(f"`{_json(value)}`" for value in values))
            for name, values in UNSUPPORTED.items()
        ],
        "responses": list(_response_differences(translate)),
        "errors": [
            (str(error.status), f"`{code}`", translate(error.meaning))
            for code, error in ERROR_CODES.items()
        ],
        "limits": [
            (translate(field.metadata["meaning"]), f"{field.default:,}")
            for field in dataclasses.fields(Limits)
        ],
        "metrics": [
            (f"`{family.name}{'_total' * (family.type == 'counter')}`", family.type,
             translate(family.documentation))
            for family in Metrics([]).registry.collect()
        ],
    }  # fmt: skip


def _endpoints() -> Iterator[tuple[str, str, str]]:
    app: Any = create_app(Service({}))
    while not hasattr(app, "openapi"):
        app = app._app
    for path, methods in app.openapi()["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation["description"]


def _parameters(
    model: type[BaseModel],
    lang: str,
    translate: Callable[[str], str],
    without: Sequence[str] | Any = (),
) -> Iterator[tuple[str, ...]]:
    document = model.model_json_schema()
    for name, field in document["properties"].items():
        if name in without:
            continue
        meaning, _, default = field["description"].partition(" Default: ")
        if name in document.get("required", ()):
            shown_default = _WORDS[lang].get("required", "required")
        elif default:
            shown_default = translate(default.removesuffix("."))
        else:
            shown_default = f"`{_json(field['default'])}`"
        support = "no effect" if field.get(SUPPORT) == "ignored" else "yes"
        yield (
            f"`{name}`",
            _type(field, lang),
            shown_default,
            _WORDS[lang].get(support, support),
            translate(meaning),
            translate(field[DIFFERENCE]) if DIFFERENCE in field else "",
        )


def _type(field: dict[str, Any], lang: str, in_array: bool = False) -> str:
    """Describe a JSON schema: type and range, or a link to the object's table."""
    words = _WORDS[lang]
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "enum" in field or "const" in field:
        return " · ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    alternatives = field.get("anyOf", field.get("oneOf"))
    if alternatives:
        shown = [_type(kind, lang) for kind in alternatives if kind.get("type") != "null"]
        return words["or"].join(dict.fromkeys(shown)).replace("`或", "` 或")
    text = words.get(field["type"], field["type"])
    if field["type"] == "array":
        text = words["array"].format(_type(field["items"], lang, in_array=True))
        text = text.replace("数组数组", "数组的数组")
        bounds = _range(field.get("minItems"), field.get("maxItems"))
        bounds = bounds and words["items"].format(bounds)
    else:
        text += words["plural"] * in_array
        bounds = _range(field.get("minimum"), field.get("maximum"))
    return text + (words["bounds"].format(bounds) if bounds and not in_array else "")


def _range(low: float | None, high: float | None) -> str:
    """Return a range; bounds at the limits of an integer type are left out."""
    low = None if low is not None and low < -MAX_INT else low
    high = None if high is not None and high >= MAX_INT else high
    if low is not None and high is not None:
        return f"{low:g}–{high:g}" if low >= 0 else f"{low:g} … {high:g}"
    if low is not None:
        return f"≥ {low:g}"
    return f"≤ {high:g}" if high is not None else ""


def _response_differences(translate: Callable[[str], str]) -> Iterator[tuple[str, str, str]]:
    for model in vars(schema).values():
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            continue
        for name, field in model.model_fields.items():
            extra = field.json_schema_extra
            if isinstance(extra, dict) and DIFFERENCE in extra and name in model.__annotations__:
                yield f"`{model.__name__}`", f"`{name}`", translate(str(extra[DIFFERENCE]))


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _table(lang: str, name: str, rows: list[tuple[str, ...]]) -> str:
    head = _HEADS[lang].get(name, _HEADS[lang]["parameters"])
    lines = [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, *rows)
    ]
    lines.insert(1, "|---" * len(head) + "|")
    return "\n".join(lines)
