"""Exact nearest neighbours."""

import numpy as np
import pytest

from stages.metrics import neighbours


def _brute_force(queries: np.ndarray, candidates: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    distances = np.sqrt(
        np.square(queries[:, None].astype(np.float64) - candidates[None])
        .reshape(len(queries), len(candidates), -1)
        .sum(-1)
    )
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, order, 1), order


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks of queries, of candidates and of columns, for a few small images."""
    for name, size in (("QUERY_ROWS", 3), ("CANDIDATE_ROWS", 20), ("EXACT_COLUMNS", 7)):
        monkeypatch.setattr(neighbours, name, size)


def test_chunked_search_of_images_equals_brute_force(small_chunks):
    """Distances and indices of 8-bit images are equal to the last bit."""
    generator = np.random.default_rng(0)
    queries, candidates = (generator.integers(0, 256, (n, 4, 4, 3), dtype=np.uint8) for n in (7, 50))
    distances, indices = neighbours.nearest(queries, candidates, 3)
    expected = _brute_force(queries, candidates, 3)
    assert (distances == expected[0]).all() and (indices == expected[1]).all()


def test_chunked_search_of_features_equals_brute_force(small_chunks):
    """Distances and indices of vectors of floats, too."""
    generator = np.random.default_rng(0)
    queries, candidates = (generator.normal(size=(n, 11)).astype(np.float32) for n in (7, 50))
    distances, indices = neighbours.nearest(queries, candidates, 3)
    expected = _brute_force(queries, candidates, 3)
    np.testing.assert_allclose(distances, expected[0], rtol=1e-12)
    assert (indices == expected[1]).all()


def test_distances_of_the_most_different_images_are_exact():
    """The products of black and white pixels are the largest; float32 still has each of their sums."""
    side = 64
    white, black = np.full((1, side, side, 3), 255, np.uint8), np.zeros((1, side, side, 3), np.uint8)
    nearly_black = black.copy()
    nearly_black[0, 0, 0, 0] = 1
    distances, indices = neighbours.nearest(white, np.concatenate([black, nearly_black]), 2)
    assert indices.tolist() == [[1, 0]]
    assert (np.square(distances).round() == [[255**2 * side**2 * 3 - 255**2 + 254**2, 255**2 * side**2 * 3]]).all()


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_exact_copy_has_distance_zero(kind):
    """The distance between equal images is exactly 0, also for large images."""
    generator = np.random.default_rng(1)
    candidates = generator.integers(0, 256, (40, 64, 64, 3)).astype(kind)
    distances, indices = neighbours.nearest(candidates[17:18], candidates, 2)
    assert distances[0, 0] == 0 and indices[0, 0] == 17 and distances[0, 1] > 0


def test_equal_distances_are_ordered_by_index(small_chunks):
    """Of many equal training images, the first ones are found, in whatever chunk they are."""
    candidates = np.full((45, 2, 2, 3), 9, np.uint8)
    candidates[:13] = 200
    assert neighbours.nearest(candidates[20:21], candidates, 3)[1].tolist() == [[13, 14, 15]]


def test_merged_parts_equal_one_search():
    """Searches of two parts of the candidates, merged, equal one search of all candidates."""
    generator = np.random.default_rng(2)
    queries, candidates = generator.normal(size=(5, 8)), generator.normal(size=(31, 8))
    expected = neighbours.nearest(queries, candidates, 4)
    left, right = neighbours.nearest(queries, candidates[:10], 4), neighbours.nearest(queries, candidates[10:], 4)
    merged = neighbours.merge([left, (right[0], right[1] + 10)], 4)
    np.testing.assert_allclose(merged[0], expected[0], rtol=1e-12)
    assert (merged[1] == expected[1]).all()


def test_fewer_candidates_than_k_are_all_returned():
    """With fewer than k candidates, each query gets all of them."""
    assert neighbours.nearest(np.zeros((2, 3)), np.ones((1, 3)), 3)[1].tolist() == [[0], [0]]
    assert neighbours.nearest(np.zeros((2, 3), np.uint8), np.ones((1, 3), np.uint8), 3)[1].tolist() == [[0], [0]]
