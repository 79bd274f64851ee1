"""Contamination: benchmark questions that occur word for word in training data.

`minimind.data.ngrams` defines when a question occurs in a document. The data is read once, in
blocks; memory use is proportional to the size of the questions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minimind.data.input_files import list_files
from minimind.data.invalid import InvalidRecords
from minimind.data.ngrams import QuestionIndex
from minimind.data.prepare.shards import text_batches
from minimind.data.read import read_texts


@dataclass
class Contamination:
    """Questions found in data.

    found: the file, by question id. too_short: ids of questions that were skipped.
    """

    found: dict[str, str] = field(default_factory=dict)
    too_short: set[str] = field(default_factory=set)
    characters: int = 0
    invalid_records: int = 0

    def with_prefix(self, prefix: str) -> "Contamination":
        """Return the questions whose ids start with a prefix, with the prefix removed."""
        return Contamination(
            {n.removeprefix(prefix): f for n, f in self.found.items() if n.startswith(prefix)},
            {n.removeprefix(prefix) for n in self.too_short if n.startswith(prefix)},
            self.characters,
            self.invalid_records,
        )

    def metrics(self) -> dict[str, Any]:
        """Return the metrics as JSON."""
        return {
            "found": len(self.found),
            "too_short": len(self.too_short),
            "characters": self.characters,
            "invalid_records": self.invalid_records,
            "questions": self.found,
        }


def find_contamination(
    questions: Mapping[str, str],
    data: Sequence[str],
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> Contamination:
    """Search all records of the data (files, folders, globs) for questions (id to text).

    Raises DataError if the data cannot be read.
    """
    # --8<-- [start:search]
    index = QuestionIndex(questions)
    result = Contamination(too_short=index.too_short)
    invalid = InvalidRecords()
    for path in data:
        for file in list_files(path):
            for texts in text_batches(read_texts([file], invalid=invalid, progress=progress)):
                result.characters += sum(map(len, texts))
                for _, name in index.search(texts):
                    result.found.setdefault(name, str(file))
    # --8<-- [end:search]
    result.invalid_records = invalid.total
    return result


def files_size(data: Sequence[str]) -> int:
    """Return the total size of the data's files in bytes."""
    return sum(Path(file).stat().st_size for path in data for file in list_files(path))
