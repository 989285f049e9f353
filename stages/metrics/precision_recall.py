"""Precision and recall of samples by their features. Higher is better.

Precision is the share of samples that look real; recall is the share of real images that the samples cover.
The support of a set is the union of balls around its features. The radius of each ball is the distance to the k-th
nearest neighbour within the set. Values depend on the feature network, on k and on the number of images.
Source: Kynkäänniemi et al. 2019, equations 1 and 2.

Axes: N reference images, M compared images, D features, R rows of one chunk.
"""

from collections.abc import Callable

import numpy as np

from stages.metrics.chunks import map_chunks


def precision(reference: np.ndarray, images: np.ndarray, k: int) -> float:
    """Compute the share of images, features (M, D), inside the support of the reference, (N, D).

    Raises ValueError unless both sets have more than k images.
    """
    smaller = min(len(reference), len(images))
    if smaller <= k:
        raise ValueError(f"k must be below the number of images of each set, {smaller}, got {k}; use more images")
    radii = _squared_radii(reference, k)
    is_inside = _map_distances(lambda distances: np.asarray((distances <= radii).any(axis=1)), images, reference)
    return float(is_inside.mean())


def recall(reference: np.ndarray, images: np.ndarray, k: int) -> float:
    """Compute the share of the reference, (N, D), inside the support of the images, (M, D).

    Raises ValueError unless both sets have more than k images.
    """
    return precision(images, reference, k)


def _squared_radii(features: np.ndarray, k: int) -> np.ndarray:
    """Return the squared distance of each vector to its k-th nearest neighbour: (N, D) -> (N,)."""
    # In sorted order the 0th distance is that of the vector to itself, so index k is the k-th neighbour.
    return _map_distances(lambda distances: np.partition(distances, k, axis=1)[:, k], features, features)


def _map_distances(function: Callable[[np.ndarray], np.ndarray], left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Reduce each chunk of rows of the matrix of squared distances: (M, D), (N, D), (R, N) -> (R,) gives (M,)."""
    left, right = left.astype(np.float64), right.astype(np.float64)
    squared_norms = np.square(right).sum(axis=1)

    def reduce(rows: slice) -> np.ndarray:
        # |l - r|^2 = |l|^2 - 2 l.r + |r|^2; rounding can make it slightly negative.
        norms = np.square(left[rows]).sum(axis=1)[:, None]
        return function(np.maximum(0, norms - 2 * left[rows] @ right.T + squared_norms))

    return np.concatenate(list(map_chunks(reduce, len(left))))
