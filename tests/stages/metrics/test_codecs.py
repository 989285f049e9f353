"""Codecs through Pillow: rate and distortion."""

import io

import numpy as np
import pytest
from PIL import Image, features

from stages.metrics import codecs


def images(count: int = 3, side: int = 32) -> np.ndarray:
    """Return smooth images that compress: a colour gradient with some noise."""
    generator = np.random.default_rng(0)
    ramp = np.linspace(0, 200, side)[None, :, None, None] + np.linspace(0, 40, side)[None, None, :, None]
    return (ramp + generator.integers(0, 16, (count, side, side, 3))).astype(np.uint8)


@pytest.mark.parametrize("codec", codecs.available())
def test_higher_quality_takes_more_bits_and_gives_less_distortion(codec: str):
    """Rate and PSNR rise with quality, for each codec."""
    low, high = (codecs.summarize(codecs.measure(images(), codec, quality), 32) for quality in (10, 90))
    assert low["bits_per_pixel"] < high["bits_per_pixel"] and low["psnr"] < high["psnr"]
    assert low["images"] == 3 and 0 < low["ssim"] <= 1


def test_rate_and_header_add_up_to_the_file():
    """The bits of one JPEG file are those of its contents and of its header."""
    single = images(1)
    buffer = io.BytesIO()
    Image.fromarray(single[0]).save(buffer, "JPEG", quality=50, optimize=True)
    values = codecs.summarize(codecs.measure(single, "jpeg", 50), 32)
    assert values["bits_per_pixel"] + values["header_bits_per_pixel"] == pytest.approx(8 * buffer.tell() / 32**2)
    assert 0 < values["bits_per_pixel"] < 8 * buffer.tell() / 32**2


def test_sums_of_parts_equal_those_of_all_images():
    """Two images and one image give the sums of three."""
    parts = [codecs.measure(batch, "jpeg", 50) for batch in (images()[:2], images()[2:])]
    together = codecs.summarize(codecs.measure(images(), "jpeg", 50), 32)
    assert codecs.summarize(codecs.add(parts), 32) == pytest.approx(together, rel=1e-6)


def test_codec_that_pillow_cannot_write_is_not_available(monkeypatch):
    """A Pillow without AVIF leaves the other codecs."""
    monkeypatch.setattr(features, "check", lambda name: name != "avif")
    assert codecs.available() == ["jpeg", "webp"]
