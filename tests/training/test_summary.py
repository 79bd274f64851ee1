from pathlib import Path

import pytest

from tests.support.stages import MakeRecipe, train


def test_the_unigram_baseline_weights_sources_as_an_epoch_does(
    recipe: MakeRecipe, corpus: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "zzzz qqqq zzzz qqqq. "}\n' * 400, encoding="utf-8")
    texts = str(corpus / "text.jsonl")

    def baseline(name: str, *sources: str) -> float:
        settings = {"data__sources": list(sources), "data__validation": [texts]}
        result = train(recipe(out=tmp_path / name, **settings, training__steps=1))
        return float(result.summary["unigram_bits_per_byte"])

    equal, rare = baseline("equal", texts, str(other)), baseline("rare", texts, f"{other}@0.01")
    assert rare < equal - 0.05, "the held-out text is like the first source"
    assert rare == pytest.approx(baseline("none", texts), rel=0.01)
