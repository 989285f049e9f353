"""Rate: bits per image of its codes, negative log-likelihood of the codes, and a bound on the bits of the pixels.

A level with n codes per image and K entries has three rates: fixed, n log2 K; under its prior, -log2 p(codes); and the
size of its column in the files. Compression is relative to 24 bits per pixel.
Sources: Razavi et al. 2019, section 3; van den Oord et al. 2017, section 4.2.

Axes: B images.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet

BITS_PER_PIXEL = 24  # of an uncompressed image: 3 colours of 8 bits


class LikelihoodSums(NamedTuple):
    """Sums of negative log-likelihood over images. Additive over batches and workers."""

    images: float
    codes: float
    nats: float  # sum over images of -ln p(codes)
    squared: float  # sum over images of (-ln p(codes))^2


def measure(nats: np.ndarray, codes_per_image: int) -> LikelihoodSums:
    """Sum the negative log-likelihoods of images, (B,), in nats per image."""
    nats = nats.astype(np.float64)
    return LikelihoodSums(len(nats), len(nats) * codes_per_image, float(nats.sum()), float((nats**2).sum()))


def add(sums: Iterable[LikelihoodSums]) -> LikelihoodSums:
    """Add up the sums of batches or workers."""
    return LikelihoodSums(*(float(total) for total in np.sum(list(sums), axis=0)))


def summarize(sums: LikelihoodSums) -> dict[str, float]:
    """Compute the NLL per code in nats and in bits, and the standard error of the mean over images, in nats per code.

    The standard error is left out for a single image.
    """
    nats = sums.nats / sums.codes
    summary = {"nats_per_code": nats, "bits_per_code": nats / math.log(2)}
    if sums.images > 1:
        # Unbiased variance over images, n / (n - 1) (E[x^2] - E[x]^2), then per code.
        mean = sums.nats / sums.images
        variance = max(0.0, sums.squared / sums.images - mean**2) * sums.images / (sums.images - 1)
        summary["nats_per_code_se"] = math.sqrt(variance / sums.images) * sums.images / sums.codes
    return summary


def fixed_bits(entries: int, codes_per_image: int) -> float:
    """Compute the bits of one image's codes under a uniform prior: n log2 K."""
    return codes_per_image * math.log2(entries)


def summarize_bits(bits_per_image: float, image_size: int) -> dict[str, float]:
    """Convert bits per image to bits per pixel, bits per dimension (pixel and colour) and compression factor."""
    per_pixel = bits_per_image / image_size**2
    summary = {"bits_per_pixel": per_pixel, "bits_per_dimension": per_pixel / 3}
    if bits_per_image > 0:
        summary["compression"] = BITS_PER_PIXEL / per_pixel
    return summary


def pixel_bits_per_dimension(mse: float, bits_per_image: float, image_size: int) -> float:
    """Compute an upper bound on the bits per dimension of the pixels: the codes plus the residual.

    The residual is coded under one Gaussian around the reconstruction with the MSE as variance:
    log2(sigma sqrt(2 pi e)) bits, sigma in 8-bit levels. The bound is loose because all pixels share one variance.
    """
    sigma = math.sqrt(mse) * 127.5  # pixels in [-1, 1] to 8-bit levels
    return math.log2(sigma * math.sqrt(2 * math.pi * math.e)) + bits_per_image / (3 * image_size**2)


def column_bytes(files: Iterable[Path]) -> tuple[dict[str, int], int]:
    """Return the compressed bytes of each column in Parquet files, page headers included, and the number of rows."""
    sizes: dict[str, int] = {}
    rows = 0
    for path in files:
        metadata = pyarrow.parquet.read_metadata(path)
        rows += metadata.num_rows
        for group in range(metadata.num_row_groups):
            for index in range(metadata.num_columns):
                column = metadata.row_group(group).column(index)
                name = column.path_in_schema.split(".")[0]
                sizes[name] = sizes.get(name, 0) + column.total_compressed_size
    return sizes, rows
