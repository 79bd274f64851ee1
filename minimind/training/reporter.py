"""Progress reports of long tasks. The command line draws them; the base class ignores them."""


class Reporter:
    """Ignores everything. Subclasses draw progress bars and print lines."""

    def start(self, title: str, total: int, done: int = 0, unit: str = "step") -> None:
        """Begin a task of `total` units, of which `done` are finished already."""

    def progress(self, done: int, total: int, note: str = "") -> None:
        """Update the task; `note` is a short text to show next to the progress bar."""

    def stop(self) -> None:
        """End the task."""

    def say(self, text: str) -> None:
        """Print one or a few lines."""


def pluralize(number: int, noun: str) -> str:
    """Format a count: `1 sequence`, `2,000 sequences`."""
    return f"{number:,} {noun}" + "s" * (number != 1)
