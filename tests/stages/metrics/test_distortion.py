"""Distortion adds up over workers and divides once."""

import math

import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from stages.metrics import distortion


def test_unequal_batches_add_up_to_what_one_batch_says():
    """Three images on one worker and one on another measure what four together do."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 16, 16, generator=generator) * 2 - 1
    others = (images + 0.1 * torch.randn(images.shape, generator=generator)).clamp(-1, 1)
    together = distortion.summarize(distortion.measure(images, others))
    apart = distortion.summarize(
        distortion.add([distortion.measure(images[:3], others[:3]), distortion.measure(images[3:], others[3:])])
    )
    assert apart == pytest.approx(together, rel=1e-6)
    assert together["mse"] == pytest.approx((images - others).square().mean().item(), rel=1e-6)
    expected = structural_similarity_index_measure(others, images, data_range=2.0).item()
    assert together["ssim"] == pytest.approx(expected, rel=1e-5)


def test_psnr_of_the_papers_error_is_29_decibels():
    """An MSE of 0.0050 over pixels in [-1, 1] is 29.0 dB."""
    assert distortion.psnr(0.0050) == pytest.approx(29.03, abs=0.01)
    assert distortion.psnr(0.0) == math.inf


def test_equal_and_tiny_images_give_only_what_exists():
    """No infinite PSNR is written, nor a SSIM of images smaller than its window."""
    assert distortion.summarize(distortion.measure(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))) == {"mse": 0.0}
