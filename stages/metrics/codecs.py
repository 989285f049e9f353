"""Image codecs with which the rate and distortion of a VQ-VAE are compared: JPEG, WebP and AVIF, through Pillow.

At a few dozen pixels most bytes of a file are its header. It is therefore counted apart: as the size of the file of an
image of one colour, which has next to no contents.

Axes: N images, H rows, W columns, 3 RGB channels.
"""

import io
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, features

from stages.metrics import distortion
from stages.metrics.distortion import Distances, DistortionSums

QUALITIES = (5, 10, 25, 50, 75, 90)  # Pillow's scale for all three, 0 to 100; equal numbers are not equal qualities
GREY = 128


class Codec(NamedTuple):
    """Image format of Pillow."""

    label: str  # name in the report
    feature: str  # name in PIL.features; a Pillow without it cannot write the format
    options: dict[str, Any]  # of Image.save: the smallest files that take no unusual time


CODECS = {
    "jpeg": Codec("JPEG", "jpg", {"optimize": True}),
    "webp": Codec("WebP", "webp", {"method": 6}),
    # One thread, because the workers use all processors. More threads would also change the bytes.
    "avif": Codec("AVIF", "avif", {"speed": 6, "max_threads": 1}),
}


class CodecSums(NamedTuple):
    """Sums over images of one codec at one quality. Additive over batches and workers."""

    bytes: float  # of whole files
    header_bytes: float
    distortion: DistortionSums


def available() -> list[str]:
    """Return the names of the codecs that this Pillow can write."""
    return [name for name, codec in CODECS.items() if features.check(codec.feature)]


def measure(images: np.ndarray, codec: str, quality: int, perceptual: Distances | None = None) -> CodecSums:
    """Compress and decompress images, uint8 (N, H, W, 3). `perceptual` computes ST-LPIPS."""
    files = [_compress(image, codec, quality) for image in images]
    decoded = np.stack([_decompress(file, codec) for file in files])
    header = len(_compress(np.full_like(images[0], GREY), codec, quality))
    left, right = (torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 127.5 - 1 for batch in (images, decoded))
    return CodecSums(sum(map(len, files)), header * len(files), distortion.measure(left, right, perceptual))


def to_list(sums: CodecSums) -> list[float]:
    """Return the sums as numbers, for a file."""
    return [sums.bytes, sums.header_bytes, *sums.distortion]


def from_list(numbers: Sequence[float]) -> CodecSums:
    """Return the sums of `to_list`."""
    return CodecSums(numbers[0], numbers[1], DistortionSums(*numbers[2:]))


def add(sums: Iterable[CodecSums]) -> CodecSums:
    """Add up the sums of batches or workers."""
    sums = list(sums)
    return CodecSums(
        sum(part.bytes for part in sums),
        sum(part.header_bytes for part in sums),
        distortion.add(part.distortion for part in sums),
    )


def summarize(sums: CodecSums, image_size: int) -> dict[str, float]:
    """Compute the number of images, bits per pixel without and of the header, and the distortion."""
    bits_per_byte_and_pixel = 8 / (sums.distortion.images * image_size**2)
    return {
        "images": int(sums.distortion.images),
        "bits_per_pixel": (sums.bytes - sums.header_bytes) * bits_per_byte_and_pixel,
        "header_bits_per_pixel": sums.header_bytes * bits_per_byte_and_pixel,
        **distortion.summarize(sums.distortion),
    }


def _compress(image: np.ndarray, codec: str, quality: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, codec.upper(), quality=quality, **CODECS[codec].options)
    return buffer.getvalue()


def _decompress(file: bytes, codec: str) -> np.ndarray:
    with Image.open(io.BytesIO(file), formats=[codec.upper()]) as image:
        return np.asarray(image.convert("RGB"))
