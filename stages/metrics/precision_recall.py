"""Precision and recall: how many samples look real, and how much of what is real the samples cover. Higher is better.

Each set's support is the union of balls around its features, each as wide as the distance to its k-th neighbour
within the set. Values depend on the network, on k and on the number of images: report all three.
Source: Kynkäänniemi et al. 2019, equations 1 and 2.
"""

from collections.abc import Iterator

import numpy as np

CHUNK = 1024  # rows of distances held at once


def precision(reference: np.ndarray, images: np.ndarray, k: int) -> float:
    """Give the share of `images` whose features, `(M, D)`, lie within the support of the reference's, `(N, D)`."""
    fewest = min(len(reference), len(images))
    if fewest <= k:
        raise ValueError(f"precision and recall with k = {k} of {fewest} images; use more images than k")
    radii = _radii(reference, k)
    inside = [(rows <= radii).any(axis=1) for rows in _distances(images, reference)]
    return float(np.concatenate(inside).mean())


def recall(reference: np.ndarray, images: np.ndarray, k: int) -> float:
    """Give the share of the reference within the support of `images`: precision, the other way round."""
    return precision(images, reference, k)


def _radii(features: np.ndarray, k: int) -> np.ndarray:
    radii = [np.partition(rows, k, axis=1)[:, k] for rows in _distances(features, features)]  # the 0th is itself
    return np.concatenate(radii)


def _distances(left: np.ndarray, right: np.ndarray) -> Iterator[np.ndarray]:
    """Yield squared distances, some rows at a time. A vector and itself are at 0."""
    left, right = left.astype(np.float64), right.astype(np.float64)
    lengths = np.square(right).sum(axis=1)
    for start in range(0, len(left), CHUNK):
        rows = left[start : start + CHUNK]
        yield np.maximum(0, np.square(rows).sum(axis=1)[:, None] - 2 * rows @ right.T + lengths)
