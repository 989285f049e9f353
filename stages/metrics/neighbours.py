"""Exact nearest neighbours: the training images closest to a sample, and their distances.

Samples that are closer to the training images than validation images are indicate memorization.

Axes: N queries, M candidates, D values of a vector, k nearest, C nearest by the fast distance.
"""

import numpy as np

# Values of queries, and of candidates, converted to float at once: 128 MiB as float32. Bounds memory at any image size.
CHUNK_VALUES = 2**25
EXTRA_CANDIDATES = 8  # selected by the fast distance beyond k, so that its rounding does not lose one of the k nearest
Neighbours = tuple[np.ndarray, np.ndarray]  # distances and indices, (N, k) each, nearest first


def nearest(queries: np.ndarray, candidates: np.ndarray, k: int, *, chunk_values: int = CHUNK_VALUES) -> Neighbours:
    """Find the k candidates nearest to each query by Euclidean distance.

    Takes (N, ...) and (M, ...) of any numeric type; returns distances and indices, (N, min(k, M)) each, nearest first.
    Equal vectors have distance 0 exactly. Of candidates at equal distance, the one with the lower index comes first.
    """
    queries = queries.reshape(len(queries), -1)
    candidates = candidates.reshape(len(candidates), -1)
    rows = max(1, chunk_values // max(1, queries.shape[1]))
    chunks = [_search(queries[start : start + rows], candidates, k, rows) for start in range(0, len(queries), rows)]
    return np.concatenate([distances for distances, _ in chunks]), np.concatenate([indices for _, indices in chunks])


def merge(results: list[Neighbours], k: int) -> Neighbours:
    """Merge the results of the same queries on several sets of candidates: the k nearest of all."""
    distances = np.concatenate([distances for distances, _ in results], axis=1)
    indices = np.concatenate([indices for _, indices in results], axis=1)
    order = np.lexsort((indices, distances), axis=1)[:, :k]
    return np.take_along_axis(distances, order, axis=1), np.take_along_axis(indices, order, axis=1)


def _search(queries: np.ndarray, candidates: np.ndarray, k: int, rows: int) -> Neighbours:
    """Search the candidates in chunks of `rows`."""
    result: Neighbours = np.empty((len(queries), 0)), np.empty((len(queries), 0), dtype=np.int64)
    for start in range(0, len(candidates), rows):
        distances, indices = _search_chunk(queries, candidates[start : start + rows], k)
        result = merge([result, (distances, indices + start)], k)
    return result


def _search_chunk(queries: np.ndarray, candidates: np.ndarray, k: int) -> Neighbours:
    # |q - c|^2 = |q|^2 - 2 q.c + |c|^2 is one matrix product, but suffers from cancellation: an exact copy would not
    # get distance 0. So it only selects C candidates, whose distances are then computed exactly. |q|^2 does not change
    # the ranking of candidates and is left out. Subtracting the mean makes the terms, and so the cancellation, smaller.
    mean = candidates.mean(axis=0, dtype=np.float64).astype(np.float32)
    centred = candidates.astype(np.float32) - mean
    fast = np.square(centred).sum(axis=1) - 2 * ((queries.astype(np.float32) - mean) @ centred.T)  # (N, M)
    count = min(k + EXTRA_CANDIDATES, len(candidates))  # C
    selected = np.argpartition(fast, count - 1, axis=1)[:, :count] if count < len(candidates) else None
    distances = np.empty((len(queries), count))
    indices = np.empty((len(queries), count), dtype=np.int64)
    for row, query in enumerate(queries):
        indices[row] = np.arange(count) if selected is None else selected[row]
        difference = candidates[indices[row]].astype(np.float64) - query.astype(np.float64)
        distances[row] = np.sqrt(np.square(difference).sum(axis=1))
    return merge([(distances, indices)], k)
