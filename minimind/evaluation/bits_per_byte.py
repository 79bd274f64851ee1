"""Bits a byte: how well a model foretells text, in a measure that does not depend on its words."""

import hashlib
import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from minimind.data.input_files import list_files
from minimind.data.invalid import InvalidRecords
from minimind.data.read import read_texts
from minimind.errors import DataError, UsageError
from minimind.evaluation.scoring import Row, windows
from minimind.evaluation.statistics import ratio_interval
from minimind.evaluation.tasks import Model, Result, results_of, scored
from minimind.tokenizer.bpe import without_surrogates


class BitsPerByte:
    """Bits a byte of text: every byte of every document counts once.

    The first token is given what stands before a text in training, later ones as much of the text
    as the context holds, half of it at the least. Bytes are the text's, whatever the tokenizer.
    """

    unit = "document"

    def __init__(self, places: Sequence[str], limit: int | None) -> None:
        self.name = "bpb"
        self._files = [file for place in places for file in list_files(place)]
        if not self._files:
            raise UsageError("bpb needs text: --task bpb:PATH, or --data PATH")
        self._limit = limit
        self.bad = InvalidRecords()
        digest = hashlib.sha256()
        self._count = 0
        for _, text in self._documents(self.bad):
            digest.update(text.encode())
            self._count += 1
        self._sha256 = digest.hexdigest()
        if not self._count:
            raise DataError(f"{self._files[0]}: no line is a record; the first: {self.bad.first}")

    def _documents(self, bad: InvalidRecords) -> Iterator[tuple[str, str]]:
        """(id, text) of each; the id begins with its file."""

        def all_of_them() -> Iterator[tuple[str, str]]:
            for file in self._files:
                for number, text in enumerate(read_texts([file], invalid=bad)):
                    if text:
                        yield f"{file}#{number}", without_surrogates(text)

        return itertools.islice(all_of_them(), self._limit)

    def __len__(self) -> int:
        return self._count

    def settings(self) -> dict[str, Any]:
        """The texts too."""
        return {"task": self.name, "documents": self._count, "sha256": self._sha256}

    def texts(self) -> dict[str, str]:
        """None: text is held out by `data.validation`, not by windows."""
        return {}

    def run(self, model: Model, done: Collection[str]) -> Iterator[Result]:
        """Read again from the files."""
        return _measured(
            model, (one for one in self._documents(InvalidRecords()) if one[0] not in done)
        )

    def summary(self, results: Sequence[Result]) -> dict[str, Any]:
        """Of all, and of each file."""
        by_source: dict[str, list[Result]] = {}
        for result in results:
            by_source.setdefault(result["id"].rpartition("#")[0], []).append(result)
        metrics = _bits(results)
        if len(by_source) > 1:
            metrics["by_source"] = {name: _bits(some) for name, some in by_source.items()}
        return metrics


def measure_texts(model: Model, texts: Sequence[str]) -> float:
    """Return the bits per byte of texts together. Raises UsageError if there is no text."""
    documents = [(str(number), without_surrogates(text)) for number, text in enumerate(texts)]
    results = []
    for result in _measured(model, (document for document in documents if document[1])):
        if "error" in result:
            raise UsageError(f"text {result['id']}: {result['error']}")
        results.append(result)
    if not results:
        raise UsageError("bits per byte need at least one text that is not empty")
    return float(_bits(results)["bits_per_byte"])


def _measured(model: Model, documents: Iterable[tuple[str, str]]) -> Iterator[Result]:
    """Yield the cross-entropy in nats, bytes and tokens of each (id, text)."""
    scorer, words = model.scorer()
    start = words.text_start or [words.text_end]

    def ask(document: tuple[str, str]) -> tuple[int, Sequence[Row]]:
        [ids] = words.encode_batch([document[1]])
        return len(ids), windows(ids, start, scorer.context)

    def result(text: str, tokens: int, scores: Sequence[float]) -> Result:
        return {"nats": -sum(scores), "bytes": len(text.encode()), "tokens": tokens}

    return results_of(
        (name, found if isinstance(found, Exception) else result(text, *found))
        for (name, text), found in scored(scorer, documents, ask)
    )


def _bits(results: Sequence[Result]) -> dict[str, Any]:
    if not results:
        return {"bits_per_byte": None, "interval": None, "documents": 0}
    bits = [result["nats"] / math.log(2) for result in results]
    sizes = [result["bytes"] for result in results]
    return {
        "bits_per_byte": sum(bits) / sum(sizes),
        "interval": ratio_interval(bits, sizes),
        "documents": len(results),
        "bytes": sum(sizes),
        "tokens": sum(result["tokens"] for result in results),
    }
