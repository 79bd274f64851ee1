"""Make the generated parts of the book fresh.

    python -m docs.book [CHAPTER …]     # such as 01-language-model; default: all

Runs the scripts whose outputs are stale, and writes the notebooks.
"""

import sys
import time

from docs.book import notebook, outputs
from docs.book.chapters import chapters


def main() -> None:
    """Refresh the chapters named on the command line, or all."""
    names = {chapter.stem: chapter for chapter in chapters()}
    if unknown := set(sys.argv[1:]) - names.keys():
        sys.exit(
            f"book: no chapter {', '.join(sorted(unknown))}; there are {', '.join(names)}"
        )
    for chapter in [names[stem] for stem in sys.argv[1:]] or names.values():
        start = time.monotonic()
        if outputs.stale(chapter):
            outputs.refresh(chapter)
            print(
                f"{chapter.stem}: outputs written in {time.monotonic() - start:.1f} s"
            )
        notebook.write(chapter)


if __name__ == "__main__":
    main()
