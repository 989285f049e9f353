"""Exact nearest neighbours."""

import numpy as np

from stages.metrics import neighbours


def _brute_force(queries: np.ndarray, candidates: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    distances = np.sqrt(
        np.square(queries[:, None].astype(np.float64) - candidates[None])
        .reshape(len(queries), len(candidates), -1)
        .sum(-1)
    )
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, order, 1), order


def test_chunked_search_equals_brute_force():
    """With several chunks of queries and of candidates, distances and indices equal those of brute force."""
    generator = np.random.default_rng(0)
    queries, candidates = generator.integers(0, 256, (7, 4, 4, 3)), generator.integers(0, 256, (50, 4, 4, 3))
    distances, indices = neighbours.nearest(queries, candidates, 3, chunk_values=5 * 48)
    expected = _brute_force(queries, candidates, 3)
    assert (distances == expected[0]).all() and (indices == expected[1]).all()


def test_exact_copy_has_distance_zero():
    """The distance between equal images is exactly 0, also for large images."""
    generator = np.random.default_rng(1)
    candidates = generator.integers(0, 256, (40, 64, 64, 3)).astype(np.uint8)
    distances, indices = neighbours.nearest(candidates[17:18], candidates, 2)
    assert distances[0, 0] == 0 and indices[0, 0] == 17 and distances[0, 1] > 0


def test_merged_parts_equal_one_search():
    """Searches of two parts of the candidates, merged, equal one search of all candidates."""
    generator = np.random.default_rng(2)
    queries, candidates = generator.normal(size=(5, 8)), generator.normal(size=(31, 8))
    expected = neighbours.nearest(queries, candidates, 4)
    left, right = neighbours.nearest(queries, candidates[:10], 4), neighbours.nearest(queries, candidates[10:], 4)
    merged = neighbours.merge([left, (right[0], right[1] + 10)], 4)
    assert (merged[0] == expected[0]).all() and (merged[1] == expected[1]).all()


def test_fewer_candidates_than_k_are_all_returned():
    """With fewer than k candidates, each query gets all of them."""
    assert neighbours.nearest(np.zeros((2, 3)), np.ones((1, 3)), 3)[1].tolist() == [[0], [0]]
