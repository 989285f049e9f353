"""Rate of an image's codes, from the settings alone."""

import math

from stages.config import Params


def fixed_bits(settings: Params) -> float:
    """Compute the bits of an image's codes: log2(K) bits per code, as if all K entries were equally likely."""
    grids = settings.vqvae.grids(settings.dataset.image_size)
    return sum(side**2 * math.log2(settings.vqvae.levels[level].entries) for level, side in grids.items())
