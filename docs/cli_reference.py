"""Generate the command-line reference from the commands themselves.

The help texts stand in minimind/cli in English. Their Chinese is in `docs/translations.toml`,
section `cli`, by the English text: a changed text needs a changed translation.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from minimind.cli.main import app

_WORDS = {
    "en": {
        "title": "Command line",
        "commands": "| command | purpose |",
        "options": "| argument or option | default | meaning |",
        "required": "required",
        "range": "{text} ({range}).",
    },
    "zh": {
        "title": "命令行",
        "commands": "| 命令 | 用途 |",
        "options": "| 参数或选项 | 默认值 | 含义 |",
        "required": "必填",
        "range": "{text}（{range}）。",
    },
}
# Appended to the help of a parameter: "  [default: 8000; 0<=x<=65535]", "  [required]".
_EXTRA = re.compile(r"  \[(?=[^]]*\]$)(?:(required)|(?:default: ([^;]*))?(?:; )?(.*x.*)?)\]$")
_TYPE = re.compile(r"<list\[(\w+)\]>|<(\w+) range>")


def cli_page(lang: str, note: str, translations: dict[str, str]) -> str:
    """Return the page in one language. Raises ValueError if a translation is missing or unused."""
    used: set[str] = set()

    def translate(text: str) -> str:
        used.add(text)
        return translations.get(text, "") if lang == "zh" else text

    words = _WORDS[lang]
    root = typer.main.get_command(app)
    assert isinstance(root, TyperGroup)
    context = _context(root, "minimind")
    commands = list(_commands(root, context, 2))
    lines = [f"# {words['title']}", "", note, "", *_description(context, translate)]
    lines += [words["commands"], "|---|---|"]
    for child, _ in commands:
        if not isinstance(child.command, TyperGroup):
            name = child.command_path
            purpose = translate(_paragraphs(child.command)[0])
            lines.append(f"| [`{name}`](#{name.replace(' ', '-')}) | {_cell(purpose)} |")
    lines += ["", *_table(context, words, translate)]
    for child, level in commands:
        lines += [f"{'#' * level} {child.command_path}", "", *_description(child, translate)]
        if not isinstance(child.command, TyperGroup):
            lines += _table(child, words, translate)
    missing, left_over = used - translations.keys(), translations.keys() - used
    if missing or left_over:
        raise ValueError(
            "docs/translations.toml, section cli: "
            f"missing {sorted(missing)}, left over {sorted(left_over)}"
        )
    return "\n".join(lines).rstrip() + "\n"


def _commands(
    group: TyperGroup, parent: typer.Context, level: int
) -> Iterator[tuple[typer.Context, int]]:
    """Yield every command below a group with the level of its heading."""
    for name, command in group.commands.items():
        assert isinstance(command, TyperGroup | TyperCommand)
        context = _context(command, name, parent)
        yield context, level
        if isinstance(command, TyperGroup):
            yield from _commands(command, context, level + 1)


def _context(
    command: TyperGroup | TyperCommand, name: str, parent: typer.Context | None = None
) -> typer.Context:
    return typer.Context(command, info_name=name, parent=parent)


def _paragraphs(command: Any) -> list[str]:
    return [" ".join(text.split()) for text in (command.help or "").split("\n\n")]


def _description(context: typer.Context, translate: Callable[[str], str]) -> list[str]:
    """Return the paragraphs of a command's help, then its usage line."""
    lines = []
    for paragraph in _paragraphs(context.command):
        lines += [translate(paragraph), ""]
    if not isinstance(context.command, TyperGroup):
        usage = " ".join(context.command.get_usage(context).split()).removeprefix("Usage: ")
        lines += ["```text", usage, "```", ""]
    return lines


def _table(
    context: typer.Context, words: dict[str, str], translate: Callable[[str], str]
) -> list[str]:
    """Return one row per argument and option, except for `--help`."""
    rows = []
    for parameter in context.command.get_params(context):
        record = parameter.get_help_record(context)
        if record is None or "--help" in parameter.opts:
            continue
        name, text = record
        required, default, limits = "", "", ""
        if extra := _EXTRA.search(text):
            required, default, limits = (group or "" for group in extra.groups())
            text = text[: extra.start()]
        meaning = translate(text)
        if limits:
            limits = limits.replace("<=", " ≤ ").replace(">=", " ≥ ")
            meaning = words["range"].format(text=meaning.rstrip(".。"), range=limits)
        name = _TYPE.sub(lambda match: f"<{(match[1] or match[2]).lower()}>", name)
        shown = words["required"] if required else f"`{default}`" if default else "–"
        rows.append(f"| `{_cell(name)}` | {_cell(shown)} | {_cell(meaning)} |")
    return [words["options"], "|---|---|---|", *rows, ""] if rows else []


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
