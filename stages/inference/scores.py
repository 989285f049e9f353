"""Scores: how unlikely the codes of images are, by position, by level and by image.

Axes: N images, H x W codes of a level, S pixels along each side of an image.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Scores:
    """Negative log-likelihoods of the codes of N images under the priors."""

    maps: Mapping[str, np.ndarray]  # level -> (N, H, W) float32, nats per code, coarse to fine
    labels: np.ndarray  # (N,) label that each image is scored with; -1 without classes
    image_size: int  # S

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def per_image(self) -> np.ndarray:
        """Negative log-likelihood of all codes of each image, (N,), in nats."""
        return np.sum([grids.sum((1, 2), dtype=np.float64) for grids in self.maps.values()], axis=0)

    @property
    def per_level(self) -> dict[str, np.ndarray]:
        """Mean over the codes of each level, in nats per code: level -> (N,)."""
        return {level: grids.mean((1, 2), dtype=np.float64) for level, grids in self.maps.items()}

    def heat_maps(self, levels: Iterable[str] | None = None) -> np.ndarray:
        """Spread each code's score evenly over its pixels and add up levels, by default all: nats per pixel, (N, S, S).

        With all levels, the sum over the pixels of an image is its number in `per_image`.
        """
        names = self.maps if levels is None else levels
        return np.sum([_enlarge(self.maps[level], self.image_size) for level in names], axis=0)


def _enlarge(grids: np.ndarray, size: int) -> np.ndarray:
    factor = size // grids.shape[1]
    return grids.repeat(factor, axis=1).repeat(factor, axis=2) / np.float64(factor**2)
