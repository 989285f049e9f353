"""Precision, recall, density and coverage of samples by their features. Higher is better.

Precision and density measure whether samples look real; recall and coverage whether they are as varied as real images.
The ball of an image has the distance to its k-th nearest neighbour in its own set as its radius. Values depend on the
feature network, on k and on the number of images.

One real outlier has a large ball, and one strange sample too: that raises precision and recall, and this is why density
counts the balls, and coverage uses balls of real images only. Density may exceed 1: samples that crowd where real
images are dense lie in many balls.
Sources: Kynkäänniemi et al. 2019, equations 1 and 2 (precision, recall); Naeem et al. 2020, arXiv 2002.09797,
equations 4 and 5 (density, coverage).

Axes: N reference images, M compared images.
"""

from stages.metrics.pairs import PairSums


def precision(sums: PairSums) -> float:
    """Compute the share of images that lie in the ball of at least one reference image."""
    return float((sums.reference_balls_per_image > 0).mean())


def recall(sums: PairSums) -> float:
    """Compute the share of reference images that lie in the ball of at least one image."""
    return float((sums.image_balls_per_reference > 0).mean())


def density(sums: PairSums, k: int) -> float:
    """Compute the mean number of reference balls that contain an image, divided by k.

    Its expectation is about 1 for two sets of one distribution.
    """
    return float(sums.reference_balls_per_image.mean() / k)


def coverage(sums: PairSums) -> float:
    """Compute the share of reference images whose ball contains at least one image."""
    return float((sums.images_per_reference_ball > 0).mean())
