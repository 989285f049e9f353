"""Random augmentation of training images: each result is a pure function of a seed.

To add one, add a field to `AugmentConfig` (stages/config.py) and a value to each file of conf/augment/, then its code
and its condition in `augment`. Draw its random numbers only if it is on: otherwise all images change.
"""

import numpy as np

from stages.config import AugmentConfig


def augment(image: np.ndarray, config: AugmentConfig, *seed: int) -> np.ndarray:
    """Flip and shift an (H, W, 3) image at random, seeded by `seed`. Shifting repeats the edge pixels."""
    if not (config.flip or config.max_shift):
        return image
    random = np.random.Generator(np.random.PCG64(seed))
    if config.flip and random.random() < 0.5:
        image = image[:, ::-1]
    if config.max_shift:
        # A crop from the edge-padded image: offset `max_shift` is no shift, 0 and 2 * max_shift are the extremes.
        margin = config.max_shift
        top, left = random.integers(0, 2 * margin + 1, size=2)
        height, width, _ = image.shape
        padded = np.pad(image, ((margin, margin), (margin, margin), (0, 0)), mode="edge")
        image = padded[top : top + height, left : left + width]
    return image
