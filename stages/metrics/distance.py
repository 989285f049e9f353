"""Distances between two sets of images, by their features. Lower is better; the name says which network saw them.

KID has no bias at any number of images, so it comes first; the Fréchet distance grows as images get fewer, so only
values of equal numbers compare. Neither is FID unless the features are those of FID's own Inception network.
Source: Bińkowski et al. 2018 (KID), Heusel et al. 2017 (Fréchet distance).
"""

import numpy as np

HALVES = 100  # random halves behind a standard error
CHUNK = 1024  # rows of the kernel held at once


def kid(reference: np.ndarray, images: np.ndarray, *, seed: int) -> tuple[float, float]:
    """Estimate the squared maximum mean discrepancy under the kernel (x.y / D + 1)^3, and its standard error.

    The value uses every pair of `(N, D)` and `(M, D)`. The error is the spread over random halves of both sets, which
    for halves needs no correction (the delete-d jackknife with d = N / 2); it is NaN below four images.
    """
    if min(len(reference), len(images)) < 2:
        raise ValueError(f"KID compares {len(reference)} with {len(images)} images; it needs 2 or more of each")
    # Row 0 chooses every image; the other rows each choose a random half.
    generator = np.random.default_rng(seed)
    rows, columns = _choices(len(reference), generator), _choices(len(images), generator)
    values = (
        _mean_kernel(reference, reference, rows, rows, itself=True)
        + _mean_kernel(images, images, columns, columns, itself=True)
        - 2 * _mean_kernel(reference, images, rows, columns, itself=False)
    )
    enough = min(len(reference), len(images)) >= 4
    return float(values[0]), float(np.std(values[1:], ddof=1)) if enough else float("nan")


def frechet(reference: np.ndarray, images: np.ndarray) -> float:
    """Compute the Fréchet distance of the Gaussians that fit two sets of features, `(N, D)` and `(M, D)`.

    |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2), where with S = R'R the last trace is the sum of the singular
    values of R1 R2': no square root of a matrix, and exact where covariances have no full rank (N <= D).
    """
    if min(len(reference), len(images)) < 2:
        raise ValueError(f"a Fréchet distance of {len(reference)} and {len(images)} images; it needs 2 or more of each")
    reference, images = reference.astype(np.float64), images.astype(np.float64)
    means = reference.mean(axis=0), images.mean(axis=0)
    roots = [_root(features - mean) for features, mean in zip((reference, images), means, strict=True)]
    overlap = np.linalg.norm(roots[0] @ roots[1].T, "nuc")
    distance = np.square(means[0] - means[1]).sum() + sum(np.square(root).sum() for root in roots) - 2 * overlap
    return float(max(0.0, distance))


def _root(deviations: np.ndarray) -> np.ndarray:
    """Find R with R'R the covariance of centred features, in as few rows as there are images or features."""
    root = deviations / np.sqrt(len(deviations) - 1)
    return root if len(root) <= root.shape[1] else np.asarray(np.linalg.qr(root, mode="r"))


def _choices(count: int, generator: np.random.Generator) -> np.ndarray:
    """Mark the images that each estimate uses, `(1 + HALVES, count)`: all of them, then random halves."""
    chosen = np.zeros((1 + HALVES, count))
    chosen[0] = 1
    for half in chosen[1:]:
        half[generator.permutation(count)[: count // 2]] = 1
    return chosen


def _mean_kernel(
    left: np.ndarray, right: np.ndarray, rows: np.ndarray, columns: np.ndarray, *, itself: bool
) -> np.ndarray:
    """Average the kernel over the chosen pairs, for each choice; `itself`: no image is a pair with itself."""
    left, right = left.astype(np.float64), right.astype(np.float64)
    totals = np.zeros(len(rows))
    for start in range(0, len(left), CHUNK):
        kernel = (left[start : start + CHUNK] @ right.T / left.shape[1] + 1) ** 3
        totals += ((rows[:, start : start + CHUNK] @ kernel) * columns).sum(axis=1)
    pairs = rows.sum(axis=1) * columns.sum(axis=1)
    if itself:
        totals -= rows @ (np.square(left).sum(axis=1) / left.shape[1] + 1) ** 3
        pairs -= rows.sum(axis=1)
    return totals / np.maximum(pairs, 1)
