import random
from pathlib import Path

import numpy as np
import pytest

from minimind.data.prepare import duplicates
from minimind.data.prepare.duplicates import (
    EXACT,
    KEEP,
    NEAR,
    actions,
    cluster_sizes,
    connect,
    find_edges,
    sample_near,
    sort_keys,
)
from minimind.data.prepare.shards import write_array


def test_the_first_document_of_a_component_is_its_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "_EDGES_AT_ONCE", 7)
    rng = random.Random(0)
    size = 300
    edges = [np.array([[rng.randrange(size) for _ in range(40)] for _ in range(2)]) for _ in "abcd"]
    chain = np.array([range(100, 199), range(101, 200)])  # many rounds of attaching
    edges.append(chain[:, ::-1])

    expected = list(range(size))  # by repeated relabelling, which is slow and plainly right
    for _ in range(size):
        for one, two in np.concatenate(edges, 1).T.tolist():
            expected[one] = expected[two] = min(expected[one], expected[two])
    assert connect(size, edges).tolist() == expected
    assert connect(size, reversed(edges)).tolist() == expected


@pytest.mark.parametrize("num_parts", [1, 3, 8])
def test_edges_lead_from_the_first_document_with_a_key(tmp_path: Path, num_parts: int) -> None:
    rng = np.random.default_rng(0)
    top = np.uint64(1 << 60)
    shards = [rng.integers(0, 16, (2, n), np.uint64) * top for n in (50, 0, 30)]
    files, first_id = [], 0
    for number, keys in enumerate(shards):
        sorted_keys, rows = sort_keys(keys)
        paths = tmp_path / f"{number}.keys.npy", tmp_path / f"{number}.rows.npy"
        write_array(paths[0], sorted_keys)
        write_array(paths[1], rows)
        files.append((*paths, first_id))
        first_id += keys.shape[1]
    for band in (0, 1):
        keys = np.concatenate(shards, 1)[band].tolist()
        expected = {
            (keys.index(key), number) for number, key in enumerate(keys) if keys.index(key) < number
        }
        parts = [find_edges(files, band, part, num_parts) for part in range(num_parts)]
        found = [tuple(edge) for part in parts for edge in part.T.tolist()]
        assert len(found) == len(expected)
        assert set(found) == expected


def test_actions_and_samples() -> None:
    roots = np.array([0, 0, 2, 0, 4, 2], np.uint32)
    decided = actions(roots, [np.array([[0], [1]])])
    assert decided.tolist() == [KEEP, EXACT, KEEP, NEAR, KEEP, NEAR]
    assert sample_near(decided, roots, 5) == [(3, 0), (5, 2)]
    assert len(sample_near(decided, roots, 1)) == 1
    assert cluster_sizes(roots, decided) == {2: 2}
    assert cluster_sizes(roots[:1], decided[:1]) == {}
