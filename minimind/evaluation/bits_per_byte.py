r"""Bits per byte: how well a model predicts text, comparable across tokenizers.

The cross-entropy loss is the mean of -ln p(token | tokens before it), in nats per token, and
perplexity is exp(loss). Both depend on the tokenizer: with a larger vocabulary a token covers more
text and is harder to predict. Bits per byte divides the total -log2 p of a text by its number of
UTF-8 bytes, which does not depend on the tokenizer:

    bits per byte = sum(nats) / ln 2 / bytes
                  = log2(perplexity) * tokens / bytes

It is also a compression rate: an arithmetic coder that uses the model's predictions needs that
many bits per byte (Shannon 1948). A uniform guess over bytes needs 8; lower is better.
"""

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from minimind.data.input_files import list_files
from minimind.data.invalid import InvalidRecords
from minimind.data.read import read_texts
from minimind.errors import DataError, UsageError
from minimind.evaluation.scoring import Row, sliding_windows
from minimind.evaluation.statistics import ratio_interval
from minimind.evaluation.tasks import Model, Result, evenly_spaced, score_items, to_results
from minimind.tokenizer.bpe import without_surrogates


class BitsPerByte:
    """Bits per byte of documents; every byte of every document counts once.

    The first token is conditioned on the token that starts a document in training. Later tokens
    are conditioned on the document before them, as far as the context reaches: at least half a
    context (see `sliding_windows`).
    """

    unit = "document"

    kind = "bpb"

    def __init__(self, sources: Sequence[str], limit: int | None, name: str = "bpb") -> None:
        """Read all documents once. A file that is named by several paths counts once."""
        self.name = name
        files: dict[Path, Path] = {}
        for file in (file for source in sources for file in list_files(source)):
            files.setdefault(file.resolve(), file)
        self._files = list(files.values())
        self._sources = set(map(str, self._files))
        if not self._files:
            raise UsageError("bpb needs text: give --task bpb:PATH, or --data PATH")
        self.invalid = InvalidRecords()
        self._selected: set[int] | None = None  # numbers among all documents; None: all
        if limit is not None:
            total = sum(1 for _ in self._documents(InvalidRecords()))
            self._selected = set(evenly_spaced(range(total), limit))
        digest = hashlib.sha256()
        self._count = 0
        for _, text in self._documents(self.invalid):
            digest.update(text.encode())
            self._count += 1
        self._sha256 = digest.hexdigest()
        if not self._count:
            raise DataError(
                f"{self._files[0]}: contains no valid record; the first error: {self.invalid.first}"
            )

    def _documents(self, invalid: InvalidRecords) -> Iterator[tuple[str, str]]:
        """Yield (id, text) of each document; an id is FILE#NUMBER."""
        documents = (
            (f"{file}#{number}", without_surrogates(text))
            for file in self._files
            for number, text in enumerate(read_texts([file], invalid=invalid))
            if text
        )
        selected = self._selected
        if selected is None:
            return documents
        numbered = enumerate(itertools.islice(documents, max(selected, default=-1) + 1))
        return (document for number, document in numbered if number in selected)

    def __len__(self) -> int:
        return self._count

    def __contains__(self, item_id: object) -> bool:
        return str(item_id).rpartition("#")[0] in self._sources

    def settings(self) -> dict[str, Any]:
        """Return the settings, with a hash of the documents."""
        return {"task": self.kind, "documents": self._count, "sha256": self._sha256}

    def texts(self) -> dict[str, str]:
        """Return no texts: bits per byte is measured on text that is excluded from training."""
        return {}

    def run(self, model: Model, done: Mapping[str, Result]) -> Iterator[Result]:
        """Yield results in order; the files are read again."""
        documents = self._documents(InvalidRecords())
        return _score_documents(model, (pair for pair in documents if pair[0] not in done))

    def summary(self, results: Sequence[Result]) -> dict[str, Any]:
        """Return the metrics of all documents, and of each file if there are several."""
        by_source: dict[str, list[Result]] = {}
        for result in results:
            by_source.setdefault(result["id"].rpartition("#")[0], []).append(result)
        metrics = _metrics(results)
        if len(by_source) > 1:
            metrics["by_source"] = {name: _metrics(source) for name, source in by_source.items()}
        return metrics


def measure_texts(model: Model, texts: str | Sequence[str]) -> float:
    """Return the bits per byte of all texts together. Raises UsageError if there is no text."""
    texts = [texts] if isinstance(texts, str) else texts
    documents = [(str(number), without_surrogates(text)) for number, text in enumerate(texts)]
    results = []
    for result in _score_documents(model, (document for document in documents if document[1])):
        if "error" in result:
            raise UsageError(f"text {result['id']}: {result['error']}")
        results.append(result)
    if not results:
        raise UsageError("bits per byte need at least one text that is not empty")
    return float(_metrics(results)["bits_per_byte"])


def _score_documents(model: Model, documents: Iterable[tuple[str, str]]) -> Iterator[Result]:
    """Yield the cross-entropy in nats, and the number of bytes and tokens, of each (id, text)."""
    scorer, encoder = model.scorer()
    start = encoder.text_start or [encoder.text_end]

    def prepare(text: str) -> tuple[Sequence[Row], Callable[[list[float]], Result]]:
        [ids] = encoder.encode_batch([text])
        num_bytes, num_tokens = len(text.encode()), len(ids)

        def to_result(scores: list[float]) -> Result:
            return {"nats": -sum(scores), "bytes": num_bytes, "tokens": num_tokens}

        return sliding_windows(ids, start, scorer.context), to_result

    return to_results(score_items(scorer, documents, prepare))


def _metrics(results: Sequence[Result]) -> dict[str, Any]:
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
