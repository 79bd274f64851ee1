import random

import numpy as np

from minimind.data.prepare.characters import code_points
from minimind.data.prepare.minhash import _minima, band_keys, exact_keys
from minimind.data.prepare.settings import NearDuplicateSettings
from tests.support.corpora import Corpus

SETTINGS = NearDuplicateSettings(shingle=5, bands=14, rows=8)

EXACT = ["90dfe7f23b9fb5ab", "b3c8e5f8f380daaa"]
BANDS = ["fef2cdd0a9e04b0f", "3d5b3f057a037f37", "fd8be209bf9efc46", "730037ee3d3656f3"]


def keys_of(texts: list[str]) -> np.ndarray:
    points = code_points(texts)
    return band_keys(points, exact_keys(points), SETTINGS)


def test_keys_are_the_same_on_every_platform() -> None:
    points = code_points(["长江是中国最长的河流，全长约6300公里。", "短"])
    assert [f"{key:016x}" for key in exact_keys(points)] == EXACT
    keys = band_keys(points, exact_keys(points), SETTINGS)
    assert [f"{key:016x}" for key in keys[[0, 13]].reshape(-1)] == BANDS


def test_a_batch_gives_the_keys_of_its_documents() -> None:
    corpus = Corpus(2)
    texts = [corpus.document(300), "短", corpus.document(60), "甲乙丙丁戊", corpus.document(900)]
    batch = keys_of(texts)
    for column, text in enumerate(texts):
        assert (keys_of([text])[:, 0] == batch[:, column]).all()


def test_punctuation_case_and_width_do_not_matter() -> None:
    corpus = Corpus(3)
    text = corpus.document(300) + "ABC 123"
    copy = corpus.noisy(text).replace("ABC 123", "ａｂｃ，１２３")
    assert exact_keys(code_points([text])) == exact_keys(code_points([copy]))
    assert (keys_of([text]) == keys_of([copy])).all()


def test_documents_shorter_than_a_shingle_match_only_exact_copies() -> None:
    keys = keys_of(["甲乙丙", "甲，乙丙", "甲乙丁"])
    assert (keys[:, 0] == keys[:, 1]).all()
    assert (keys[:, 0] != keys[:, 2]).all()


def test_minima_estimate_the_similarity() -> None:
    """The standard error of 112 independent hash functions is sqrt(s (1 - s) / 112)."""
    rng = random.Random(0)
    settings = NearDuplicateSettings(shingle=1, bands=14, rows=8)
    errors, variances = [], []
    for size in (40, 200, 800):
        for shared in (0.2, 0.5, 0.8, 0.95):
            characters = [chr(0x4E00 + n) for n in rng.sample(range(20_000), 2 * size)]
            common = round(size * shared)
            one = "".join(characters[:size])
            two = "".join(characters[:common] + characters[size : 2 * size - common])
            similarity = common / (2 * size - common)
            minima = _minima(code_points([one, two]), np.array([True, True]), settings)
            errors.append(float((minima[:, 0] == minima[:, 1]).mean()) - similarity)
            variances.append(similarity * (1 - similarity) / 112)
    ratio = np.sqrt(np.mean(np.square(errors)) / np.mean(variances))
    assert 0.5 < ratio < 1.5
