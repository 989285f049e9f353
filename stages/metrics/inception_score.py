"""Inception score: how certain a classifier is of each image, and how varied its answers are.

N images, K classes of the network.
Source: Salimans et al. 2016, "Improved Techniques for Training GANs", section 4.
"""

import numpy as np

LOG_OFFSET = 1e-12  # keeps p log p finite where a probability is 0 in float32


def inception_score(probabilities: np.ndarray) -> float:
    """Compute exp of the mean KL divergence of p(y|x), (N, K), from the mean over the images: from 1 to K.

    It rises with N: compare sets of equal size. All images form one split, where the source averages over ten.
    """
    p = probabilities.astype(np.float64)
    divergences = (p * (np.log(p + LOG_OFFSET) - np.log(p.mean(axis=0) + LOG_OFFSET))).sum(axis=1)
    return float(np.exp(divergences.mean()))
