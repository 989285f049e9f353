"""Nearest neighbours, exact: which training images a sample is closest to, and how close.

Samples that are nearer to the training images than held-out images are, have been learnt by heart.
"""

import numpy as np

CHUNK = 2**25  # numbers held at once of either side, as floats: bounds memory whatever the size of images
Neighbours = tuple[np.ndarray, np.ndarray]  # distances and indices, nearest first
SPARE = 8  # extra candidates kept by the fast distance and ranked by the exact one


def nearest(queries: np.ndarray, candidates: np.ndarray, k: int) -> Neighbours:
    """Find the k candidates nearest to each query by Euclidean distance: distances and indices, `(N, k)` each.

    Fewer than k candidates give as many columns as there are. Equal vectors are at distance 0 exactly; ties go to the
    lower index. Rows may be of any numeric type.
    """
    queries = queries.reshape(len(queries), -1)
    candidates = candidates.reshape(len(candidates), -1)
    size = max(1, CHUNK // max(1, queries.shape[1]))
    return _stack(
        [_among(queries[start : start + size], candidates, k, size) for start in range(0, len(queries), size)]
    )


def _among(queries: np.ndarray, candidates: np.ndarray, k: int, size: int) -> Neighbours:
    found: Neighbours = np.empty((len(queries), 0)), np.empty((len(queries), 0), dtype=np.int64)
    for start in range(0, len(candidates), size):
        distances, indices = _nearest(queries, candidates[start : start + size], k)
        found = merge([found, (distances, indices + start)], k)
    return found


def _stack(found: list[Neighbours]) -> Neighbours:
    return np.concatenate([part[0] for part in found]), np.concatenate([part[1] for part in found])


def merge(found: list[Neighbours], k: int) -> Neighbours:
    """Keep the k nearest of what was found in several parts."""
    distances = np.concatenate([part[0] for part in found], axis=1)
    indices = np.concatenate([part[1] for part in found], axis=1)
    order = np.lexsort((indices, distances), axis=1)[:, :k]
    return np.take_along_axis(distances, order, axis=1), np.take_along_axis(indices, order, axis=1)


def _nearest(queries: np.ndarray, candidates: np.ndarray, k: int) -> Neighbours:
    # |q - c|^2 = |q|^2 - 2 q.c + |c|^2 is one matrix product, but cancels: a copy would not be at 0. So it only picks
    # the best few, whose differences are then taken one by one. |q|^2 ranks nothing, and is left out.
    centre = candidates.mean(axis=0, dtype=np.float64).astype(np.float32)
    shifted = candidates.astype(np.float32) - centre
    fast = np.square(shifted).sum(axis=1) - 2 * ((queries.astype(np.float32) - centre) @ shifted.T)
    kept = min(k + SPARE, len(candidates))
    picked = np.argpartition(fast, kept - 1, axis=1)[:, :kept] if kept < len(candidates) else None
    distances = np.empty((len(queries), kept))
    indices = np.empty((len(queries), kept), dtype=np.int64)
    for row, query in enumerate(queries):
        indices[row] = np.arange(kept) if picked is None else picked[row]
        difference = candidates[indices[row]].astype(np.float64) - query.astype(np.float64)
        distances[row] = np.sqrt(np.square(difference).sum(axis=1))
    return merge([(distances, indices)], k)
