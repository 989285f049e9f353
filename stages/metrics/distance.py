"""Distances between two sets of images, computed from their features: KID and Fréchet distance. Lower is better.

KID is unbiased at any number of images. The Fréchet distance has a positive bias that shrinks with the number of
images: compare only values computed at the same number. Both depend on the feature network, so the metric's key names
it; the Fréchet distance is FID only with the features of FID's Inception network.
Sources: Bińkowski et al. 2018 (KID), Heusel et al. 2017 (FID).

Axes: N reference images, M compared images, D features, S subset selections.
"""

import numpy as np

from stages.metrics.chunks import map_chunks

SUBSETS = 100  # random halves for a standard error; its own relative error is about 1 / sqrt(2 x 100) = 7%


def kid(reference: np.ndarray, images: np.ndarray, *, seed: int) -> tuple[float, float]:
    """Compute the unbiased KID of features (N, D) and (M, D), and its standard error.

    KID = mean k(r, r') + mean k(x, x') - 2 mean k(r, x), the squared maximum mean discrepancy with the kernel
    k(x, y) = (x . y / D + 1)^3; the first two means leave out the pairs of a vector with itself.
    The standard error is the standard deviation over random halves of both sets. This is the delete-d jackknife with
    d = N / 2, where its correction factor is 1. It is NaN below four images.
    Raises ValueError if a set has fewer than two images.
    """
    _check_sizes("KID", reference, images)
    # Selection 0 has all images; the others each have a random half.
    generator = np.random.default_rng(seed)
    of_reference, of_images = _selections(len(reference), generator), _selections(len(images), generator)
    values = (
        _mean_kernel(reference, reference, of_reference, of_reference, exclude_diagonal=True)
        + _mean_kernel(images, images, of_images, of_images, exclude_diagonal=True)
        - 2 * _mean_kernel(reference, images, of_reference, of_images, exclude_diagonal=False)
    )
    has_error = min(len(reference), len(images)) >= 4  # half of it has two images, the least for one value
    return float(values[0]), float(np.std(values[1:], ddof=1)) if has_error else float("nan")


def frechet(reference: np.ndarray, images: np.ndarray) -> float:
    """Compute the Fréchet distance between the Gaussians fitted to features (N, D) and (M, D).

    |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2) with means m and covariances S.
    With S = R'R, tr (S1 S2)^(1/2) is the nuclear norm (sum of singular values) of R1 R2'. This needs no matrix square
    root, and is exact for singular covariances (N <= D).
    Raises ValueError if a set has fewer than two images.
    """
    _check_sizes("the Fréchet distance", reference, images)
    reference, images = reference.astype(np.float64), images.astype(np.float64)
    means = reference.mean(axis=0), images.mean(axis=0)
    roots = [_covariance_root(features - mean) for features, mean in zip((reference, images), means, strict=True)]
    trace_of_root = np.linalg.norm(roots[0] @ roots[1].T, "nuc")
    distance = np.square(means[0] - means[1]).sum() + sum(np.square(root).sum() for root in roots) - 2 * trace_of_root
    return float(max(0.0, distance))  # rounding can make it slightly negative


def _check_sizes(metric: str, reference: np.ndarray, images: np.ndarray) -> None:
    if min(len(reference), len(images)) < 2:
        raise ValueError(
            f"{metric} must have 2 or more images of each set, got {len(reference)} reference images and {len(images)}"
        )


def _covariance_root(centred: np.ndarray) -> np.ndarray:
    """Return R with R'R = the covariance of centred features (N, D): (min(N, D), D)."""
    root = centred / np.sqrt(len(centred) - 1)
    return root if len(root) <= root.shape[1] else np.asarray(np.linalg.qr(root, mode="r"))


def _selections(count: int, generator: np.random.Generator) -> np.ndarray:
    """Return 0/1 indicators of the selected images, (S, count) with S = 1 + SUBSETS: all images, then random halves."""
    selected = np.zeros((1 + SUBSETS, count))
    selected[0] = 1
    for half in selected[1:]:
        half[generator.permutation(count)[: count // 2]] = 1
    return selected


def _mean_kernel(
    left: np.ndarray,
    right: np.ndarray,
    left_selected: np.ndarray,
    right_selected: np.ndarray,
    *,
    exclude_diagonal: bool,
) -> np.ndarray:
    """Average the kernel over the selected pairs: features (N, D), (M, D), indicators (S, N), (S, M) -> (S,).

    `exclude_diagonal` leaves out the pairs of an image with itself; then `left` and `right` are the same set.
    """
    left, right = left.astype(np.float64), right.astype(np.float64)

    def total(rows: slice) -> np.ndarray:
        kernel = (left[rows] @ right.T / left.shape[1] + 1) ** 3
        return ((left_selected[:, rows] @ kernel) * right_selected).sum(axis=1)  # (S,)

    totals = sum(map_chunks(total, len(left)), np.zeros(len(left_selected)))
    pairs = left_selected.sum(axis=1) * right_selected.sum(axis=1)
    if exclude_diagonal:
        totals -= left_selected @ (np.square(left).sum(axis=1) / left.shape[1] + 1) ** 3
        pairs -= left_selected.sum(axis=1)
    return totals / np.maximum(pairs, 1)
