"""Near-duplicates against datatrove (Hugging Face), the independent judge; it must be installed."""

from pathlib import Path
from typing import Any

import pytest

from tests.data.prepare.test_pipeline import run, texts_in
from tests.support.corpora import Corpus, write_texts


def survivors_of_datatrove(data: Path, folder: Path) -> set[str]:
    """Return the texts that remain after its MinHash pipeline with 14 bands of 8 rows."""
    from datatrove.executor.local import LocalPipelineExecutor
    from datatrove.pipeline.dedup import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Characters(WordTokenizer):
        """Shingles of characters instead of words, as in our pipeline."""

        def word_tokenize(self, text: str) -> list[str]:
            return [character for character in text if character.isalnum()]

        def sent_tokenize(self, text: str) -> list[str]:
            return [text]

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return [(0, len(text))]

    config = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8)
    names = [str(folder / name) for name in ("signatures", "buckets", "removed", "kept")]
    signatures, buckets, removed, kept = names
    steps: list[list[Any]] = [
        [JsonlReader(str(data)), MinhashDedupSignature(signatures, config, Characters())],
        [MinhashDedupBuckets(signatures, buckets, config=config)],
        [MinhashDedupCluster(buckets, removed, config=config)],
        [JsonlReader(str(data)), MinhashDedupFilter(removed),
         JsonlWriter(kept, "${rank}.jsonl", compression=None)],
    ]  # fmt: skip
    for number, step in enumerate(steps):
        tasks = 14 if number == 1 else 1
        LocalPipelineExecutor(
            step, tasks=tasks, workers=1, logging_dir=str(folder / f"log{number}")
        ).run()
    documents = JsonlReader(kept)
    return {document.text for document in documents()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of another project
def test_datatrove_finds_the_same_near_duplicates(tmp_path: Path) -> None:
    pytest.importorskip("datatrove")
    corpus = Corpus(8)
    # Pairs of an original and an edited copy; the copies come later than all originals.
    originals = {
        share: [corpus.document(500) for _ in range(400)] for share in (0.01, 0.02, 0.05, 0.1)
    }
    copies = {
        share: [corpus.edited(text, share) for text in texts] for share, texts in originals.items()
    }
    unrelated = [corpus.document(500) for _ in range(200)]
    groups = [*originals.values(), *copies.values(), unrelated]
    data = tmp_path / "data"
    data.mkdir()
    file = write_texts(data / "texts.jsonl", [text for group in groups for text in group])
    theirs = survivors_of_datatrove(data, tmp_path)
    run([file], tmp_path / "out")
    ours = set(texts_in(tmp_path / "out"))
    for share in originals:
        # A pair is found if one of its members is gone: datatrove keeps any member of a cluster.
        pairs = list(zip(originals[share], copies[share], strict=True))
        rates = [
            sum(not {one, two} <= kept for one, two in pairs) / len(pairs)
            for kept in (ours, theirs)
        ]
        # Two independent samples of hash functions: four standard errors of their difference.
        error = (sum(rate * (1 - rate) for rate in rates) / len(pairs)) ** 0.5
        assert abs(rates[0] - rates[1]) <= max(4 * error, 0.02), (share, rates)
    # Neither removes an unrelated document.
    assert set(unrelated) <= ours
    assert set(unrelated) <= theirs
