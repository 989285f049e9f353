"""Exact nearest neighbours: the training images closest to a sample, and their distances.

Samples that are closer to the training images than validation images are indicate memorization.

Axes: N queries, M candidates, D values of a vector, k nearest, C nearest by the fast distance.
"""

import numpy as np
import torch

QUERY_ROWS = 2048  # queries compared at once: bounds the memory for distances
CANDIDATE_ROWS = 4096
# |q - c|^2 = |q|^2 + |c|^2 - 2 q.c takes one matrix product, whose rounding float32 usually does not survive: an exact
# copy would not get distance 0. Of 8-bit values minus 128, a product is an integer of at most 2^14, and a sum of 2^10
# products one of at most 2^24, the largest up to which float32 has all integers. So a product of 2^10 columns is exact
# on every device, in any order of summation, and so is the sum of such products in float64.
EXACT_COLUMNS = 2**10
EXTRA_CANDIDATES = 8  # selected by the fast distance beyond k, so that its rounding does not lose one of the k nearest
Neighbours = tuple[np.ndarray, np.ndarray]  # distances and indices, (N, k) each, nearest first


def nearest(queries: np.ndarray, candidates: np.ndarray, k: int, device: torch.device | str = "cpu") -> Neighbours:
    """Find the k candidates nearest to each query by Euclidean distance.

    Takes (N, ...) and (M, ...), both uint8 or both floating-point; returns distances and indices, (N, min(k, M)) each,
    nearest first. Equal vectors have distance 0 exactly. Of candidates at equal distance, the one with the lower index
    comes first. `device` computes the distances of uint8; the result is the same on each.
    """
    queries = queries.reshape(len(queries), -1)
    candidates = candidates.reshape(len(candidates), -1)
    is_exact = queries.dtype == candidates.dtype == np.uint8
    result: Neighbours = np.empty((len(queries), 0)), np.empty((len(queries), 0), dtype=np.int64)
    for first in range(0, len(candidates), CANDIDATE_ROWS):
        chunk = candidates[first : first + CANDIDATE_ROWS]
        chunk_results = [
            _nearest_bytes(rows, chunk, k, torch.device(device)) if is_exact else _nearest_floats(rows, chunk, k)
            for rows in (queries[start : start + QUERY_ROWS] for start in range(0, len(queries), QUERY_ROWS))
        ]
        distances = np.concatenate([distances for distances, _ in chunk_results])
        indices = np.concatenate([indices for _, indices in chunk_results])
        result = merge([result, (distances, indices + first)], k)
    return result


def merge(results: list[Neighbours], k: int) -> Neighbours:
    """Merge the results of the same queries on several sets of candidates: the k nearest of all."""
    distances = np.concatenate([distances for distances, _ in results], axis=1)
    indices = np.concatenate([indices for _, indices in results], axis=1)
    order = np.lexsort((indices, distances), axis=1)[:, :k]
    return np.take_along_axis(distances, order, axis=1), np.take_along_axis(indices, order, axis=1)


def _nearest_bytes(queries: np.ndarray, candidates: np.ndarray, k: int, device: torch.device) -> Neighbours:
    """Search uint8 vectors by their exact distances."""
    squared = torch.zeros(len(queries), len(candidates), dtype=torch.float64, device=device)
    query_norms, candidate_norms = squared.new_zeros(len(queries)), squared.new_zeros(len(candidates))
    for start in range(0, queries.shape[1], EXACT_COLUMNS):
        columns = slice(start, start + EXACT_COLUMNS)
        left, right = (_centred(vectors[:, columns], device) for vectors in (queries, candidates))
        squared.sub_(left @ right.T, alpha=2)
        query_norms += left.square().sum(dim=1)
        candidate_norms += right.square().sum(dim=1)
    squared += query_norms[:, None] + candidate_norms
    # One integer per pair, ordered by distance and then by index: no two are equal, so the selection has no ties.
    count = len(candidates)
    keys = squared.long() * count + torch.arange(count, device=device)
    keys = keys.topk(min(k, count), dim=1, largest=False, sorted=True).values
    return np.sqrt((keys // count).cpu().numpy().astype(np.float64)), (keys % count).cpu().numpy()


def _centred(values: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(device).float().sub_(128)


def _nearest_floats(queries: np.ndarray, candidates: np.ndarray, k: int) -> Neighbours:
    """Search by a fast distance that may be rounded, and rank the C nearest by exact ones."""
    # |q|^2 does not change the ranking of candidates and is left out. Subtracting the mean makes the terms, and so the
    # cancellation, smaller.
    mean = candidates.mean(axis=0, dtype=np.float64)
    centred = candidates - mean
    fast = np.square(centred).sum(axis=1) - 2 * ((queries - mean) @ centred.T)  # (N, M)
    count = min(k + EXTRA_CANDIDATES, len(candidates))  # C
    selected = np.argpartition(fast, count - 1, axis=1)[:, :count]
    distances = np.empty(selected.shape)
    for row, query in enumerate(queries):
        difference = candidates[selected[row]].astype(np.float64) - query.astype(np.float64)
        distances[row] = np.sqrt(np.square(difference).sum(axis=1))
    return merge([(distances, selected)], k)
