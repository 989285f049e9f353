"""Distortion: how far reconstructions are from their images. Lower MSE is better; higher PSNR and SSIM are.

Pixels lie in [-1, 1], so PSNR = 10 log10(4 / MSE). SSIM is that of Wang et al. 2004, with its 11-pixel window.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

RANGE = 2.0  # of pixels, from -1 to 1
WINDOW = 11  # pixels; smaller images have no SSIM


class DistortionSums(NamedTuple):
    """What some images say about distortion. Sums add up, over batches and over workers."""

    images: float
    values: float  # pixels times colours
    squared: float  # sum over values of the squared difference
    similarity: float  # sum over images of SSIM; NaN where images are smaller than its window


def measure(images: Tensor, reconstructions: Tensor) -> DistortionSums:
    """Compare two batches of shape (B, 3, H, W) in [-1, 1], in float32."""
    from torchmetrics.functional.image import structural_similarity_index_measure  # slow to import, rarely needed

    images, reconstructions = images.float(), reconstructions.float()
    squared = (images - reconstructions).square().sum(dtype=torch.float64).item()
    similarity = float("nan")
    if min(images.shape[2:]) >= WINDOW:
        # One value per image: a reduction over the batch would depend on how images fall into batches.
        each = structural_similarity_index_measure(reconstructions, images, data_range=RANGE, reduction="none")
        assert isinstance(each, Tensor)
        similarity = each.sum(dtype=torch.float64).item()
    return DistortionSums(len(images), images.numel(), squared, similarity)


def add(sums: Iterable[DistortionSums]) -> DistortionSums:
    """Add up what several workers measured."""
    return DistortionSums(*(float(total) for total in np.sum(list(sums), axis=0)))


def psnr(mse: float) -> float:
    """Express an MSE of pixels in [-1, 1] as a peak signal-to-noise ratio, in decibels; infinite for equal images."""
    return 10 * math.log10(RANGE**2 / mse) if mse > 0 else math.inf


def summarize(sums: DistortionSums) -> dict[str, float]:
    """Divide once: MSE over pixels and colours, PSNR of that MSE in decibels, mean SSIM."""
    mse = sums.squared / sums.values
    summary = {"mse": mse}
    if mse > 0:  # JSON has no infinity
        summary["psnr"] = psnr(mse)
    if not np.isnan(sums.similarity):
        summary["ssim"] = sums.similarity / sums.images
    return summary
