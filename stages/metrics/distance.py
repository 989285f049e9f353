"""Distances between two sets of images, computed from their features: KID and Fréchet distance. Lower is better.

KID of independent sets is unbiased at any number of images; that of images and their own reconstructions is too low.
The Fréchet distance has a positive bias that shrinks with the number of images: compare only values computed at the
same number. Both depend on the feature network, so the metric's key names it; the Fréchet distance is FID only with
the features of FID's Inception network.
Sources: Bińkowski et al. 2018 (KID), Heusel et al. 2017 (FID).

Axes: N reference images, M compared images, D features, S subset selections.
"""

import numpy as np

from stages.metrics.pairs import Features, SetComparison

CHUNK_ROWS = 4096  # images whose features are in memory as float64 at once, for covariances


def kid(sums: SetComparison) -> tuple[float, float]:
    """Compute the unbiased KID of two sets, and its standard error.

    KID = mean k(r, r') + mean k(x, x') - 2 mean k(r, x), the squared maximum mean discrepancy with the kernel
    k(x, y) = (x . y / D + 1)^3; the first two means leave out the pairs of a vector with itself.
    The standard error is the standard deviation over random halves of both sets. This is the delete-d jackknife with
    d = N / 2, where its correction factor is 1. It is an upper bound: for two sets of one distribution, where KID is 0,
    it is too large by up to the square root of 3. It is NaN below four images.
    Raises ValueError if a set has fewer than two images.
    """
    sizes = len(sums.between.images_per_reference_ball), len(sums.between.reference_balls_per_image)
    _check_sizes("KID", *sizes)
    reference, images = (_selection_sizes(size, len(sums.kernel_sums_of_reference)) for size in sizes)
    values = (
        sums.kernel_sums_of_reference / np.maximum(reference * (reference - 1), 1)
        + sums.kernel_sums_of_images / np.maximum(images * (images - 1), 1)
        - 2 * sums.between.kernel_sums / np.maximum(reference * images, 1)
    )
    has_error = min(sizes) >= 4  # half of it has two images, the least for one value
    return float(values[0]), float(np.std(values[1:], ddof=1)) if has_error else float("nan")


def frechet(reference: Features, images: Features) -> float:
    """Compute the Fréchet distance between the Gaussians fitted to features (N, D) and (M, D).

    Raises ValueError if a set has fewer than two images.
    """
    _check_sizes("the Fréchet distance", len(reference), len(images))
    return frechet_of_gaussians(fit_gaussian(reference), fit_gaussian(images))


def fit_gaussian(features: Features) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean (D,) of two or more features (N, D), and a root R of their covariance, R'R, (min(N, D), D)."""
    count, size = len(features), features.shape[1]
    chunks = [slice(start, start + CHUNK_ROWS) for start in range(0, count, CHUNK_ROWS)]
    mean = np.sum([features[rows].astype(np.float64).sum(axis=0) for rows in chunks], axis=0) / count
    root = np.empty((0, size))
    for rows in chunks:
        root = np.concatenate([root, (features[rows].astype(np.float64) - mean) / np.sqrt(count - 1)])
        if len(root) > size:  # R of the QR decomposition of the rows so far: the same R'R in D rows
            root = np.asarray(np.linalg.qr(root, mode="r"))
    return mean, root


def frechet_of_gaussians(reference: tuple[np.ndarray, np.ndarray], images: tuple[np.ndarray, np.ndarray]) -> float:
    """Compute the Fréchet distance of two results of `fit_gaussian`.

    |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2) with means m and covariances S.
    With S = R'R, tr (S1 S2)^(1/2) is the nuclear norm (sum of singular values) of R1 R2'. This needs no matrix square
    root, and is exact for singular covariances (N <= D).
    """
    means, roots = zip(reference, images, strict=True)
    trace_of_root = np.linalg.norm(roots[0] @ roots[1].T, "nuc")
    distance = np.square(means[0] - means[1]).sum() + sum(np.square(root).sum() for root in roots) - 2 * trace_of_root
    return float(max(0.0, distance))  # rounding can make it slightly negative


def _selection_sizes(count: int, selections: int) -> np.ndarray:
    """Return the number of images in each selection, (S,): all, then halves."""
    return np.array([count] + [count // 2] * (selections - 1))


def _check_sizes(metric: str, num_reference: int, num_images: int) -> None:
    if min(num_reference, num_images) < 2:
        raise ValueError(
            f"{metric} must have 2 or more images of each set, got {num_reference} reference images and {num_images}"
        )
