"""Write `docs/help/` from the real parser: `python -m minimind.cli.help_pages [--check]`."""

import sys
from pathlib import Path

import typer
from typer.core import TyperCommand, TyperGroup

from minimind.cli.main import app

_FOLDER = Path(__file__).parents[2] / "docs" / "help"
_WIDTH = 88  # of the pages, whatever terminal writes them


def help_pages() -> dict[str, str]:
    """File name to text: one page a verb, and README.md for the command itself."""
    command = typer.main.get_command(app)
    assert isinstance(command, TyperGroup)
    root = _context(command, "minimind")
    verbs = {name: _help(verb, name, root) for name, verb in command.commands.items()}
    contents = "\n".join(f"- [minimind {name}]({name}.md)" for name in verbs)
    pages = {"README.md": f"# minimind\n\n{_fenced(command.get_help(root))}\n{contents}\n"}
    return pages | {f"{name}.md": f"# minimind {name}\n\n{text}" for name, text in verbs.items()}


def _context(
    command: TyperGroup | TyperCommand, name: str, parent: typer.Context | None = None
) -> typer.Context:
    return typer.Context(command, info_name=name, parent=parent, terminal_width=_WIDTH)


def _help(command: object, name: str, parent: typer.Context) -> str:
    """A verb's help, then that of the verbs below it."""
    assert isinstance(command, TyperGroup | TyperCommand)
    context = _context(command, name, parent)
    text = _fenced(command.get_help(context))
    if isinstance(command, TyperGroup):
        for below, verb in command.commands.items():
            text += f"\n## {context.command_path} {below}\n\n{_help(verb, below, context)}"
    return text


def _fenced(text: str) -> str:
    return "```text\n" + "\n".join(line.rstrip() for line in text.splitlines()) + "\n```\n"


def stale_pages(folder: Path) -> list[str]:
    """Names of the pages in `folder` that are not as the parser says, or that have no verb."""
    pages = help_pages()
    there = {path.name: path.read_text("utf-8") for path in folder.glob("*.md")}
    return sorted(name for name in pages | there if pages.get(name) != there.get(name))


def write_pages(folder: Path) -> None:
    """Bring `folder` into step with the parser."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in stale_pages(folder):
        (folder / name).unlink(missing_ok=True)
    for name, text in help_pages().items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] != ["--check"]:
        write_pages(_FOLDER)
    elif stale := stale_pages(_FOLDER):
        sys.exit(f"docs/help: not in step: {', '.join(stale)}. Run: python -m {__spec__.name}")
