"""Near-duplicates against datatrove (Hugging Face), the independent judge; it must be installed."""

from pathlib import Path
from typing import Any

import pytest

from minimind.data.prepare.shards import read_shard
from tests.data.prepare.test_pipeline import run
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
    originals = [corpus.document(500) for _ in range(400)]
    shares = (0.01, 0.02, 0.05, 0.1)
    copies = {share: [corpus.edited(text, share) for text in originals] for share in shares}
    texts = [*originals, *(text for group in copies.values() for text in group)]
    texts += [corpus.document(500) for _ in range(200)]
    data = tmp_path / "data"
    data.mkdir()
    file = write_texts(data / "texts.jsonl", texts)
    theirs = survivors_of_datatrove(data, tmp_path)
    run([file], tmp_path / "out")
    ours = set(read_shard(tmp_path / "out" / "text" / "part-00000.jsonl.zst"))
    assert len(ours) < len(texts)
    for share, group in copies.items():
        # A pair is found if one of its members is gone: datatrove keeps any member of a cluster.
        found = [
            sum(
                not (one in kept and two in kept) for one, two in zip(originals, group, strict=True)
            )
            for kept in (ours, theirs)
        ]
        rates = [count / len(originals) for count in found]
        # Two independent samples of hash functions: four standard errors of their difference.
        error = (sum(rate * (1 - rate) for rate in rates) / len(originals)) ** 0.5
        assert abs(rates[0] - rates[1]) <= max(4 * error, 0.02), (share, rates)
    # Neither removes an unrelated document.
    assert set(texts[-200:]) <= ours
    assert set(texts[-200:]) <= theirs
