"""Generate the reference pages from the code: command line, settings, HTTP API.

    python -m docs.reference

Descriptions stand in the code in English. Their Chinese is in `docs/translations.toml`, and a
missing or left-over entry there is an error, so that the two languages cannot drift apart.
"""

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from docs.cli_reference import cli_page
from docs.http_reference import http_page
from docs.prepare_reference import prepare_page
from minimind.config import Role, role_of
from minimind.config.settings import Recipe

DOCS = Path(__file__).parent
_ROLES = {
    "en": {Role.IDENTITY: "must match", Role.OPERATION: "may change"},
    "zh": {Role.IDENTITY: "必须相同", Role.OPERATION: "可以改变"},
}
_NOTE = {
    "en": "This page is generated from the code; `make format` rewrites it.",
    "zh": "本页由代码自动生成，运行 `make format` 即可更新。",
}


def pages() -> dict[str, str]:
    """Return each generated page by its path below `docs/`."""
    translations = tomllib.loads((DOCS / "translations.toml").read_text("utf-8"))
    made = {}
    for lang in ("en", "zh"):
        made[f"{lang}/reference/cli.md"] = cli_page(lang, _NOTE[lang], translations["cli"])
        made[f"{lang}/reference/settings.md"] = _settings_page(lang, translations["settings"])
        page = prepare_page(lang, _NOTE[lang], translations["prepare"])
        made[f"{lang}/reference/preparation.md"] = page
        made[f"{lang}/reference/http.md"] = http_page(lang, _NOTE[lang], translations["http"])
    return made


def stale_pages(docs: Path = DOCS) -> list[str]:
    """Return the generated pages below `docs` that differ from what the code gives now."""
    return sorted(
        name
        for name, text in pages().items()
        if not (docs / name).is_file() or (docs / name).read_text("utf-8") != text
    )


def write_pages(docs: Path = DOCS) -> None:
    """Write every generated page."""
    for name, text in pages().items():
        (docs / name).parent.mkdir(parents=True, exist_ok=True)
        (docs / name).write_text(text, "utf-8")


def _settings_page(lang: str, translations: dict[str, str]) -> str:
    fields = dict(settings())
    left_over = translations.keys() - fields.keys()
    missing = {key for key, field in fields.items() if field.description} - translations.keys()
    if lang == "zh" and (left_over or missing):
        raise ValueError(
            f"docs/translations.toml: missing {sorted(missing)}, left over {sorted(left_over)}"
        )
    title, head = {
        "en": ("Recipe settings", "| setting | type | default | on resume | meaning |"),
        "zh": ("配方设置", "| 设置 | 类型 | 默认值 | 续训时 | 含义 |"),
    }[lang]
    lines = [f"# {title}", "", _NOTE[lang], ""]
    section = None
    for key, field in fields.items():
        name = key.partition(".")[0] if "." in key else ""
        if name != section:
            section = name
            heading = f"`[{name}]`" if name else {"en": "Top level", "zh": "顶层设置"}[lang]
            lines += [""] * bool(lines[-1]) + [f"## {heading}", "", head, "|---|---|---|---|---|"]
        meaning = translations.get(key, "") if lang == "zh" else field.description or ""
        role = _ROLES[lang][role_of(key)]
        lines.append(
            f"| `{key}` | {_type(field)} | {_default(field)} | {role} | {_cell(meaning)} |"
        )
    return "\n".join(lines) + "\n"


def settings() -> Iterator[tuple[str, FieldInfo]]:
    """Yield every setting of a recipe by its full name, top-level ones first."""
    tables = []
    for name, field in Recipe.model_fields.items():
        if (model := _settings_model(field.annotation)) is not None:
            tables.append((name, model))
        else:
            yield name, field
    for name, model in tables:
        for key, field in model.model_fields.items():
            yield f"{name}.{key}", field


def _settings_model(annotation: Any) -> type[BaseModel] | None:
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _type(field: FieldInfo) -> str:
    text = getattr(field.annotation, "__name__", None) if not get_args(field.annotation) else None
    text = text or str(field.annotation)
    for old, new in (("typing.", ""), ("minimind.config.settings.", ""), ("NoneType", "None")):
        text = text.replace(old, new)
    if choices := _choices(field.annotation):
        return " · ".join(f"`{choice}`" for choice in choices)
    if "Annotated[" in text:
        text = "list of paths or tables"
    return f"`{text.removesuffix(' | None')}`"


def _choices(annotation: Any) -> list[Any]:
    """Return the values of a Literal, or of an optional one."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [choice for kind in get_args(annotation) if get_origin(kind) is Literal
            for choice in get_args(kind)]  # fmt: skip


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "–"
    return "–" if value is None else f"`{_cell(str(value))}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    write_pages()
