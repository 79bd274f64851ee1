"""Keys for finding duplicates: a hash of letters and digits, and MinHash band keys.

Two documents with the same exact key are copies of each other, up to case, width, punctuation and
white space. Two documents that share the key of a band are near-duplicates, see
`NearDuplicateSettings`. All arithmetic is on unsigned integers of fixed width, so the keys are the
same on every platform.
"""

import hashlib
from functools import cache

import numpy as np
from numpy.typing import NDArray

from minimind.data.ngrams import window_hashes
from minimind.data.prepare.characters import CodePoints
from minimind.data.prepare.settings import NearDuplicateSettings

_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def exact_keys(points: CodePoints) -> NDArray[np.uint64]:
    """Return [documents] 64-bit hashes of letters and digits."""
    content = memoryview(points.folded.astype("<u4", copy=False).tobytes())
    starts, ends = (points.starts * 4).tolist(), (points.ends * 4).tolist()
    return np.fromiter(
        (
            int.from_bytes(hashlib.blake2b(content[start:end], digest_size=8).digest(), "little")
            for start, end in zip(starts, ends, strict=True)
        ),
        np.uint64,
        len(ends),
    )


def band_keys(
    points: CodePoints, exact: NDArray[np.uint64], settings: NearDuplicateSettings
) -> NDArray[np.uint64]:
    """Return [bands, documents] keys. exact: [documents] the exact keys.

    A document that is shorter than a shingle gets keys that only its exact copies share.
    """
    keys = np.empty((settings.bands, len(exact)), np.uint64)
    has_shingles = points.num_letters >= settings.shingle
    minima = _minima(points, has_shingles, settings)
    for band in range(settings.bands):
        key = np.full(minima.shape[1], band + 1, np.uint64)
        for row in minima[band * settings.rows : (band + 1) * settings.rows]:
            key = mix(key * np.uint64(_GOLDEN) + row)
        keys[band, has_shingles] = key
        keys[band, ~has_shingles] = mix(exact[~has_shingles] + np.uint64(band))
    return keys


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return well-mixed bits: the finalizer of SplitMix64 (Steele et al. 2014), a bijection."""
    values = (values ^ values >> np.uint64(30)) * _MIX_1
    values = (values ^ values >> np.uint64(27)) * _MIX_2
    return values ^ values >> np.uint64(31)


def _minima(
    points: CodePoints, has_shingles: NDArray[np.bool_], settings: NearDuplicateSettings
) -> NDArray[np.uint32]:
    """Return [hash functions, documents with shingles] minimum of each hash function.

    A hash function is multiply-shift: the upper 32 bits of a * x + b, here with 32-bit words.
    """
    multipliers, offsets = _hash_functions(settings.bands * settings.rows)
    hashes = (mix(window_hashes(points.folded, settings.shingle)) >> np.uint64(32)).astype(
        np.uint32
    )
    starts = points.starts[has_shingles]
    stops = points.ends[has_shingles] - settings.shingle + 1
    # reduceat reduces between neighbouring indices: the shingles of a document, then the windows
    # that cross into the next document, which are thrown away.
    indices = np.stack([starts, stops], 1).reshape(-1)
    if len(indices) and indices[-1] == len(hashes):
        indices = indices[:-1]
    minima = np.empty((len(multipliers), len(starts)), np.uint32)
    if not len(starts):
        return minima
    # --8<-- [start:minima]
    values = np.empty_like(hashes)
    for row, (multiplier, offset) in enumerate(zip(multipliers, offsets, strict=True)):
        np.multiply(hashes, multiplier, out=values)
        values += offset
        minima[row] = np.minimum.reduceat(values, indices)[::2]
    # --8<-- [end:minima]
    return minima


@cache
def _hash_functions(count: int) -> tuple[list[np.uint32], list[np.uint32]]:
    """Return odd multipliers and offsets, from the SplitMix64 sequence."""
    multipliers, offsets = [], []
    for index in range(1, count + 1):
        value = int(mix(np.array([index * _GOLDEN & _MASK], np.uint64))[0])
        multipliers.append(np.uint32(value >> 32 | 1))
        offsets.append(np.uint32(value & 0xFFFFFFFF))
    return multipliers, offsets
