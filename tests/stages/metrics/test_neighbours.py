"""Nearest neighbours are exact."""

import numpy as np

from stages.metrics import neighbours


def _brute(queries: np.ndarray, candidates: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    distances = np.sqrt(
        np.square(queries[:, None].astype(np.float64) - candidates[None])
        .reshape(len(queries), len(candidates), -1)
        .sum(-1)
    )
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, order, 1), order


def test_neighbours_equal_those_of_every_distance_computed(monkeypatch):
    """Over several chunks of queries and of candidates, distances and indices are those of brute force."""
    monkeypatch.setattr(neighbours, "CHUNK", 5 * 48)
    generator = np.random.default_rng(0)
    queries, candidates = generator.integers(0, 256, (7, 4, 4, 3)), generator.integers(0, 256, (50, 4, 4, 3))
    distances, indices = neighbours.nearest(queries, candidates, 3)
    expected = _brute(queries, candidates, 3)
    assert (distances == expected[0]).all() and (indices == expected[1]).all()


def test_a_planted_copy_is_found_at_distance_zero():
    """A sample that is a training image is at exactly 0, however large the vectors."""
    generator = np.random.default_rng(1)
    candidates = generator.integers(0, 256, (40, 64, 64, 3)).astype(np.uint8)
    distances, indices = neighbours.nearest(candidates[17:18], candidates, 2)
    assert distances[0, 0] == 0 and indices[0, 0] == 17 and distances[0, 1] > 0


def test_parts_merge_into_what_the_whole_gives():
    """Workers that each search a part find together what one finds in all."""
    generator = np.random.default_rng(2)
    queries, candidates = generator.normal(size=(5, 8)), generator.normal(size=(31, 8))
    whole = neighbours.nearest(queries, candidates, 4)
    left, right = neighbours.nearest(queries, candidates[:10], 4), neighbours.nearest(queries, candidates[10:], 4)
    merged = neighbours.merge([left, (right[0], right[1] + 10)], 4)
    assert (merged[0] == whole[0]).all() and (merged[1] == whole[1]).all()


def test_fewer_candidates_than_asked_for():
    """All there are come back."""
    assert neighbours.nearest(np.zeros((2, 3)), np.ones((1, 3)), 3)[1].tolist() == [[0], [0]]
