"""Distortion of reconstructions: MSE and a perceptual distance (lower is better), PSNR and SSIM (higher is better).

Pixels are in [-1, 1], a range of 2, so PSNR = 10 log10(2^2 / MSE) dB. Two PSNRs differ in what they average:

    psnr        of the mean MSE over images, of the decoder's floats as they are: the training loss in dB
    psnr_8bit   the mean over images of each image's PSNR after rounding to 8 bits, as compression papers report it

`psnr_8bit` is the higher one: rounding clips what lies outside the range of images, and a mean of logarithms gives
images with a small error more weight (Jensen's inequality). SSIM is that of Wang et al. 2004 with the default Gaussian
window of 11 x 11 pixels.

Axes: B images, 3 channels, H rows, W columns.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stages.metrics import vgg

PIXEL_RANGE = 2.0  # from -1 to 1
SSIM_WINDOW = 11  # pixels; smaller images have no SSIM
MIN_MSE = 1e-12  # floor for a finite PSNR of equal images, far below the error of float32 pixels
MAX_8BIT = 255


class DistortionSums(NamedTuple):
    """Sums of distortion over images. Additive over batches and workers."""

    images: float
    num_values: float  # number of pixels times channels
    squared_error: float  # sum over values of the squared difference
    ssim: float  # sum over images of SSIM; NaN if images are smaller than its window
    psnr_8bit: float  # sum over images of the PSNR of 8-bit pixels, in dB
    stlpips: float = math.nan  # sum over images of ST-LPIPS; NaN without its network, or if images are too small for it


Distances = Callable[[Tensor, Tensor], Tensor]  # two batches (B, 3, H, W) in [-1, 1] -> (B,)


def measure(images: Tensor, reconstructions: Tensor, perceptual: Distances | None = None) -> DistortionSums:
    """Return the distortion sums of two batches, (B, 3, H, W) in [-1, 1], computed in float32.

    `perceptual` computes ST-LPIPS (`vgg.VGG16.distances`).
    """
    from torchmetrics.functional.image import (
        structural_similarity_index_measure,  # slow to import; only evaluation needs it
    )

    images, reconstructions = images.float(), reconstructions.float()
    squared_error = (images - reconstructions).square().sum(dtype=torch.float64).item()
    ssim = math.nan
    if min(images.shape[2:]) >= SSIM_WINDOW:
        # One value per image: a mean over the batch would depend on how images are split into batches.
        per_image = structural_similarity_index_measure(
            reconstructions, images, data_range=PIXEL_RANGE, reduction="none"
        )
        assert isinstance(per_image, Tensor)
        ssim = per_image.sum(dtype=torch.float64).item()
    stlpips = math.nan
    if perceptual and min(images.shape[2:]) >= vgg.MIN_SIZE:
        # The decoder's floats can lie outside of the range of images, where the network was never trained.
        stlpips = perceptual(images, reconstructions.clamp(-1, 1)).sum(dtype=torch.float64).item()
    psnrs = psnr_8bit(images, reconstructions)
    return DistortionSums(len(images), images.numel(), squared_error, ssim, float(psnrs.sum()), stlpips)


def add(sums: Iterable[DistortionSums]) -> DistortionSums:
    """Add up the sums of batches or workers."""
    return DistortionSums(*(float(total) for total in np.sum(list(sums), axis=0)))


def psnr(mse: float) -> float:
    """Convert an MSE of pixels in [-1, 1] to a peak signal-to-noise ratio in dB.

    MIN_MSE is a floor of the MSE: equal images have a finite PSNR. A non-finite MSE gives NaN.
    """
    if not math.isfinite(mse):
        return math.nan
    return 10 * math.log10(PIXEL_RANGE**2 / max(mse, MIN_MSE))


def psnr_8bit(images: Tensor, reconstructions: Tensor) -> np.ndarray:
    """Compute the PSNR of each image after rounding to 8 bits: (B, 3, H, W) in [-1, 1] gives (B,) in dB.

    The infinite PSNR of equal images is replaced by that of images in which one value differs by one level.
    """
    left, right = (((batch.clamp(-1, 1) + 1) * (MAX_8BIT / 2)).round() for batch in (images, reconstructions))
    squared_errors = (left - right).square().sum(dim=(1, 2, 3), dtype=torch.float64).cpu().numpy()
    return 10 * np.log10(MAX_8BIT**2 * images[0].numel() / np.maximum(squared_errors, 1))


def summarize(sums: DistortionSums) -> dict[str, float]:
    """Compute MSE over pixels and channels, both PSNRs in dB, and mean SSIM and ST-LPIPS over images.

    PSNRs are left out for equal images, whose PSNR is infinite, SSIM for images smaller than its window, and ST-LPIPS
    if it was not measured.
    """
    mse = sums.squared_error / sums.num_values
    summary = {"mse": mse}
    if mse > 0:
        summary |= {"psnr": psnr(mse), "psnr_8bit": sums.psnr_8bit / sums.images}
    if not math.isnan(sums.ssim):
        summary["ssim"] = sums.ssim / sums.images
    if not math.isnan(sums.stlpips):
        summary["stlpips"] = sums.stlpips / sums.images
    return summary
