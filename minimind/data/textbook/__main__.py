"""`python -m minimind.data.textbook`: print the size of the tables and the findings of lint."""

import sys

from minimind.data.textbook.lint import lint
from minimind.data.textbook.quiz import quiz
from minimind.data.textbook.tables import load_subjects
from minimind.errors import MinimindError


def main() -> int:
    """Print counts per subject and the findings; return 1 if there are any, else 0."""
    try:
        subjects = load_subjects()
    except MinimindError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{'facts':>7} {'trained':>9} {'quiz':>7}  subject")
    total = [0, 0, 0]
    for subject in subjects:
        trained = {text for fact in subject.facts for text in fact.questions}
        counts = [subject.num_facts, len(trained), len(quiz([subject]))]
        total = [a + b for a, b in zip(total, counts, strict=True)]
        _print_line(counts, f"{subject.path.stem} ({subject.title})")
    _print_line(total, f"{len(subjects)} subjects")
    findings = lint(subjects)
    print(f"{len(findings)} findings", *findings, sep="\n")
    return int(bool(findings))


def _print_line(counts: list[int], name: str) -> None:
    facts, trained, held_out = counts
    print(f"{facts:>7,} {trained:>9,} {held_out:>7,}  {name}")


if __name__ == "__main__":
    sys.exit(main())
