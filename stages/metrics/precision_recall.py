"""Precision and recall of samples by their features. Higher is better.

Precision is the share of samples that look real; recall is the share of real images that the samples cover.
The support of a set is the union of balls around its features. The radius of each ball is the distance to the k-th
nearest neighbour within the set. Values depend on the feature network, on k and on the number of images.
Source: Kynkäänniemi et al. 2019, equations 1 and 2.

Axes: N reference images, M compared images, D features, R rows of one chunk.
"""

from collections.abc import Iterator

import numpy as np

CHUNK_ROWS = 1024  # R: rows of the distance matrix in memory at once


def precision(reference: np.ndarray, images: np.ndarray, k: int) -> float:
    """Compute the share of images, features (M, D), inside the support of the reference, (N, D).

    Raises ValueError unless both sets have more than k images.
    """
    smaller = min(len(reference), len(images))
    if smaller <= k:
        raise ValueError(f"k must be below the number of images of each set, {smaller}, got {k}; use more images")
    radii = _squared_radii(reference, k)
    is_inside = [(distances <= radii).any(axis=1) for distances in _squared_distances(images, reference)]
    return float(np.concatenate(is_inside).mean())


def recall(reference: np.ndarray, images: np.ndarray, k: int) -> float:
    """Compute the share of the reference, (N, D), inside the support of the images, (M, D).

    Raises ValueError unless both sets have more than k images.
    """
    return precision(images, reference, k)


def _squared_radii(features: np.ndarray, k: int) -> np.ndarray:
    """Return the squared distance of each vector to its k-th nearest neighbour: (N, D) -> (N,)."""
    # In sorted order the 0th distance is that of the vector to itself, so index k is the k-th neighbour.
    return np.concatenate(
        [np.partition(distances, k, axis=1)[:, k] for distances in _squared_distances(features, features)]
    )


def _squared_distances(left: np.ndarray, right: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the matrix of squared distances in chunks of rows: (M, D), (N, D) -> (R, N) at a time."""
    left, right = left.astype(np.float64), right.astype(np.float64)
    squared_norms = np.square(right).sum(axis=1)
    for start in range(0, len(left), CHUNK_ROWS):
        rows = left[start : start + CHUNK_ROWS]
        # |l - r|^2 = |l|^2 - 2 l.r + |r|^2; rounding can make it slightly negative.
        yield np.maximum(0, np.square(rows).sum(axis=1)[:, None] - 2 * rows @ right.T + squared_norms)
