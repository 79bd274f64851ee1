"""What long work tells whoever is watching; the command line draws it, tests ignore it."""


class Reporter:
    """Shows nothing. Subclasses draw progress and print lines."""

    def start(self, title: str, total: int, done: int = 0, unit: str = "step") -> None:
        """A piece of work of `total` units begins, `done` of them already behind it."""

    def progress(self, done: int, total: int, note: str = "") -> None:
        """`done` of `total` units are behind it; `note` is a short figure to show beside."""

    def stop(self) -> None:
        """The piece of work is over."""

    def say(self, text: str) -> None:
        """One line (or a few) worth reading."""


def pluralize(number: int, what: str) -> str:
    """`1 window`, `2,000 windows`."""
    return f"{number:,} {what}" + "s" * (number != 1)
