"""Rate: how many bits an image costs as codes, and what that leaves to be said about its pixels.

Three rates of one level of n codes out of K entries: n log2 K without a prior, -log2 p(codes) under the prior, and
what its column takes in the files. Compression is against 24 bits per pixel.
Source: Razavi et al. 2019, section 3; van den Oord et al. 2017, section 4.2.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet

BITS_PER_PIXEL = 24  # of an image as it is: three bytes


class LikelihoodSums(NamedTuple):
    """What some images say about a prior. Sums add up, over batches and over workers."""

    images: float
    codes: float
    nats: float  # sum over images of -ln p(codes)
    squared: float  # sum over images of its square


def measure(nats: np.ndarray, codes_per_image: int) -> LikelihoodSums:
    """Sum up the negative log-likelihood of images, `(B,)` nats each."""
    nats = nats.astype(np.float64)
    return LikelihoodSums(len(nats), len(nats) * codes_per_image, float(nats.sum()), float((nats**2).sum()))


def add(sums: Iterable[LikelihoodSums]) -> LikelihoodSums:
    """Add up what several workers measured."""
    return LikelihoodSums(*(float(total) for total in np.sum(list(sums), axis=0)))


def summarize(sums: LikelihoodSums) -> dict[str, float]:
    """Divide once: NLL per code in nats and in bits, and the standard error of the mean over images (nats)."""
    nats = sums.nats / sums.codes
    summary = {"nats_per_code": nats, "bits_per_code": nats / math.log(2)}
    if sums.images > 1:
        mean = sums.nats / sums.images
        variance = max(0.0, sums.squared / sums.images - mean**2) * sums.images / (sums.images - 1)
        summary["nats_per_code_se"] = math.sqrt(variance / sums.images) * sums.images / sums.codes
    return summary


def fixed_bits(entries: int, codes_per_image: int) -> float:
    """Give the bits of one image's codes when every entry is equally likely: the rate of a uniform prior."""
    return codes_per_image * math.log2(entries)


def summarize_bits(bits_per_image: float, image_size: int) -> dict[str, float]:
    """Express bits per image as bits per pixel, bits per dimension (pixel and colour), and compression factor."""
    per_pixel = bits_per_image / image_size**2
    summary = {"bits_per_pixel": per_pixel, "bits_per_dimension": per_pixel / 3}
    if bits_per_image > 0:
        summary["compression"] = BITS_PER_PIXEL / per_pixel
    return summary


def pixel_bits_per_dimension(mse: float, bits_per_image: float, image_size: int) -> float:
    """Bound the bits per dimension of the pixels themselves: the codes, then what the decoder missed.

    The residual is coded under one Gaussian around the reconstruction whose variance is the MSE, here in 8-bit
    levels: log2(sigma sqrt(2 pi e)). Poor by construction; it says what the codes leave out.
    """
    sigma = math.sqrt(mse) * 127.5
    return math.log2(sigma * math.sqrt(2 * math.pi * math.e)) + bits_per_image / (3 * image_size**2)


def column_bytes(files: Iterable[Path]) -> tuple[dict[str, int], int]:
    """Measure what each column of some Parquet files takes on disk, compressed, headers included; count the rows."""
    sizes: dict[str, int] = {}
    rows = 0
    for path in files:
        metadata = pyarrow.parquet.read_metadata(path)
        rows += metadata.num_rows
        for group in range(metadata.num_row_groups):
            for number in range(metadata.num_columns):
                column = metadata.row_group(group).column(number)
                name = column.path_in_schema.split(".")[0]
                sizes[name] = sizes.get(name, 0) + column.total_compressed_size
    return sizes, rows
