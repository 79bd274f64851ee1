"""Duplicates: connected components of documents with equal keys; the first of each is kept.

A document has an id: its position in the whole input, in the order of shards. All documents with
the same key of a band are candidates. Candidates are connected transitively (union-find), and the
document with the lowest id of each component is kept. So the result depends only on the documents
and their order.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minimind.data.locations import Location
from minimind.data.prepare.minhash import mix
from minimind.data.prepare.shards import read_elements

KEEP, EXACT, NEAR = range(3)  # what happens to a document
# Bytes per document: keys, their sorted copy, ids, the order of sorting, and its buffer.
BYTES_PER_KEY = 48
# Bytes per document: parent, action, and one temporary array of ids.
BYTES_PER_DOCUMENT = 16
_EDGES_AT_ONCE = 1 << 20

KeyFile = tuple[
    Location, Location, int
]  # keys [bands, n], rows [bands, n], id of the first document


def sort_keys(keys: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
    """Sort the keys of each band. keys: [bands, documents]. Return sorted keys and their rows."""
    order = np.argsort(keys, axis=1, kind="stable")
    return np.take_along_axis(keys, order, 1), order.astype(np.uint32)


def find_edges(files: Sequence[KeyFile], band: int, part: int, num_parts: int) -> NDArray[Any]:
    """Return [2, edges] ids of the first document with a key and of each other one.

    Only keys in part `part` of `num_parts` equal ranges are considered. files: in order of ids.
    """
    low, high = ((1 << 64) * bound // num_parts for bound in (part, part + 1))
    all_keys, all_ids = [], []
    for keys_path, rows_path, first_id in files:
        keys = read_elements(keys_path, band)
        start = int(np.searchsorted(keys, np.uint64(low)))
        end = len(keys) if part == num_parts - 1 else int(np.searchsorted(keys, np.uint64(high)))
        all_keys.append(np.array(keys[start:end]))
        all_ids.append(read_elements(rows_path, band, start, end - start) + np.int64(first_id))
    keys, ids = np.concatenate(all_keys), np.concatenate(all_ids)
    order = np.argsort(keys, kind="stable")  # stable: ids stay in order
    keys, ids = keys[order], ids[order]
    repeats = np.flatnonzero(keys[1:] == keys[:-1]) + 1
    is_first = np.ones(len(keys), bool)
    is_first[repeats] = False
    firsts = np.flatnonzero(is_first)
    first_of = firsts[np.searchsorted(firsts, repeats, "right") - 1]
    return np.stack([ids[first_of], ids[repeats]])


def connect(num_documents: int, edges: Iterable[NDArray[Any]]) -> NDArray[Any]:
    """Return [documents] the lowest id of the connected component of each document.

    Union-find on arrays: the higher of two roots is attached to the lower one, so a root is the
    lowest id of its component. Vectorized over edges as by Shiloach and Vishkin (1982).
    """
    parent = np.arange(num_documents, dtype=np.uint32 if num_documents < 1 << 32 else np.uint64)
    for array in edges:
        for start in range(0, array.shape[1], _EDGES_AT_ONCE):
            first, second = np.array(array[:, start : start + _EDGES_AT_ONCE])
            while True:
                first, second = _roots(parent, first), _roots(parent, second)
                differ = first != second
                if not differ.any():
                    break
                first, second = first[differ], second[differ]
                low, high = np.minimum(first, second), np.maximum(first, second)
                np.minimum.at(parent, high, low.astype(parent.dtype))
    for start in range(0, num_documents, _EDGES_AT_ONCE):
        block = slice(start, start + _EDGES_AT_ONCE)
        parent[block] = _roots(parent, parent[block])
    return parent


def _roots(parent: NDArray[Any], ids: NDArray[Any]) -> NDArray[Any]:
    """Follow the parents of `ids` to the roots, and shorten their paths."""
    roots = parent[ids]
    while True:
        following = parent[roots]
        if np.array_equal(following, roots):
            break
        roots = following
    parent[ids] = roots
    return roots


def actions(roots: NDArray[Any], exact_edges: Iterable[NDArray[Any]]) -> NDArray[np.uint8]:
    """Return [documents] KEEP, EXACT for a copy of an earlier document, or NEAR."""
    result = np.full(len(roots), KEEP, np.uint8)
    for start in range(0, len(roots), _EDGES_AT_ONCE):
        block = roots[start : start + _EDGES_AT_ONCE]
        is_later = block < np.arange(start, start + len(block))
        result[start : start + len(block)][is_later] = NEAR
    for edges in exact_edges:
        result[edges[1]] = EXACT
    return result


def sample_near(result: NDArray[np.uint8], roots: NDArray[Any], size: int) -> list[tuple[int, int]]:
    """Return (id, id of the document that is kept instead) of a uniform sample of NEAR ones."""
    near = np.flatnonzero(result == NEAR)
    order = np.argsort(mix(near.astype(np.uint64)), kind="stable")[:size]
    chosen = np.sort(near[order])
    return [(int(one), int(roots[one])) for one in chosen]


def cluster_sizes(roots: NDArray[Any], result: NDArray[np.uint8]) -> dict[int, int]:
    """Return the number of components by their size, rounded down to a power of two."""
    _, removed = np.unique(roots[result != KEEP], return_counts=True)
    bits = np.floor(np.log2(removed + 1)).astype(np.int64)
    counts = np.bincount(bits, minlength=1)
    return {1 << bit: int(count) for bit, count in enumerate(counts.tolist()) if count}
