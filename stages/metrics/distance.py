"""Distances between two sets of images, by their features. Lower is better; the name says which network saw them.

KID has no bias at any number of images, so it comes first; the Fréchet distance grows as images get fewer, so only
values of equal numbers compare. Neither is FID unless the features are those of FID's own Inception network.
Source: Bińkowski et al. 2018 (KID), Heusel et al. 2017 (Fréchet distance).
"""

import numpy as np

HALVES = 100  # random halves behind a standard error


def kid(reference: np.ndarray, images: np.ndarray, *, seed: int) -> tuple[float, float]:
    """Estimate the squared maximum mean discrepancy under the kernel (x.y / D + 1)^3, and its standard error.

    The value uses every pair of `(N, D)` and `(M, D)`. The error is the spread over random halves of both sets, which
    for halves needs no correction (the delete-d jackknife with d = N / 2); it is NaN below four images.
    """
    if min(len(reference), len(images)) < 2:
        raise ValueError(f"KID compares {len(reference)} with {len(images)} images; it needs 2 or more of each")
    within_reference, within_images = _kernel(reference, reference), _kernel(images, images)
    across = _kernel(reference, images)
    value = _discrepancy(within_reference, across, within_images)
    if min(len(reference), len(images)) < 4:
        return value, float("nan")
    generator = np.random.default_rng(seed)
    halves = []
    for _ in range(HALVES):
        rows = generator.permutation(len(reference))[: len(reference) // 2]
        columns = generator.permutation(len(images))[: len(images) // 2]
        halves.append(
            _discrepancy(
                within_reference[np.ix_(rows, rows)],
                across[np.ix_(rows, columns)],
                within_images[np.ix_(columns, columns)],
            )
        )
    return value, float(np.std(halves, ddof=1))


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


def _kernel(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return (left.astype(np.float64) @ right.astype(np.float64).T / left.shape[1] + 1) ** 3


def _discrepancy(within_reference: np.ndarray, across: np.ndarray, within_images: np.ndarray) -> float:
    def between_others(kernel: np.ndarray) -> float:  # the mean without the diagonal: no image is its own pair
        return (kernel.sum() - np.trace(kernel)) / (len(kernel) * (len(kernel) - 1))

    return float(between_others(within_reference) + between_others(within_images) - 2 * across.mean())
