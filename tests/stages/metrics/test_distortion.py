"""Distortion: MSE, PSNR and SSIM."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from stages.metrics import distortion


def test_sums_of_unequal_batches_equal_one_batch():
    """Sums of three images and of one image, added up, give the metrics of the four images."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 16, 16, generator=generator) * 2 - 1
    reconstructions = (images + 0.1 * torch.randn(images.shape, generator=generator)).clamp(-1, 1)
    one_batch = distortion.summarize(distortion.measure(images, reconstructions))
    two_batches = distortion.summarize(
        distortion.add(
            [distortion.measure(images[:3], reconstructions[:3]), distortion.measure(images[3:], reconstructions[3:])]
        )
    )
    assert two_batches == pytest.approx(one_batch, rel=1e-6)
    assert one_batch["mse"] == pytest.approx((images - reconstructions).square().mean().item(), rel=1e-6)
    expected = structural_similarity_index_measure(reconstructions, images, data_range=2.0).item()
    assert one_batch["ssim"] == pytest.approx(expected, rel=1e-5)


def test_psnr_of_the_papers_mse_is_29_db():
    """An MSE of 0.0050 over pixels in [-1, 1] is 29.0 dB; a floor of the MSE makes the PSNR of equal images finite."""
    assert distortion.psnr(0.0050) == pytest.approx(29.03, abs=0.01)
    assert distortion.psnr(0.0) == pytest.approx(126.02, abs=0.01)
    assert math.isnan(distortion.psnr(math.inf)) and math.isnan(distortion.psnr(math.nan))


def test_psnr_of_8_bit_images_is_the_mean_over_images():
    """Each image is clipped and rounded to 8 bits first; equal images count as one level off in one value."""
    images = torch.tensor([[-1.0, 1.0], [0.2, 0.2]])[:, None, None].expand(2, 3, 4, 2)
    reconstructions = images + torch.tensor([[-0.5, 0.5], [6 / 127.5] * 2])[:, None, None]  # first: beyond the range
    of_equal, of_six_levels = 20 * np.log10(255) + 10 * np.log10(24), 20 * np.log10(255 / 6)
    assert distortion.psnr_8bit(images, reconstructions) == pytest.approx([of_equal, of_six_levels])
    summary = distortion.summarize(distortion.measure(images, reconstructions))
    assert summary["psnr_8bit"] == pytest.approx((of_equal + of_six_levels) / 2)
    assert summary["psnr"] < summary["psnr_8bit"]


def test_undefined_metrics_are_left_out():
    """Equal images have no PSNR, and images smaller than the window have no SSIM."""
    assert distortion.summarize(distortion.measure(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))) == {"mse": 0.0}
