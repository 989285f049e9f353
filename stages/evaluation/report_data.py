"""Contents of the report page, before layout.

Axes: N images, H rows, W columns, K codebook entries, k nearest images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from models.priors import Grid
from stages.metrics.networks import Network

Curve = Sequence[tuple[int, str, float]]  # step, name such as "validation/mse", value


class NearestImages(NamedTuple):
    """A sample and the k training images nearest to it, nearest first; all uint8."""

    sample: np.ndarray  # (H, W, 3)
    by_space: Mapping[str, np.ndarray]  # "pixels", "features", "features_NAME" -> (k, H, W, 3)


class SamplesOfClass(NamedTuple):
    """The first samples of a class, and the number of all."""

    images: np.ndarray  # uint8 (N, H, W, 3)
    total: int


@dataclass(frozen=True)
class ReportData:
    """Metrics, images and curves of one evaluation. Images are uint8, (N, H, W, 3)."""

    metrics: Mapping[str, Any]  # as in metrics.json of the report
    notes: Sequence[str]  # warnings for the reader
    networks: Sequence[Network]  # feature networks, that of the key metrics first
    image_size: int  # pixels
    levels: Mapping[str, Grid]  # coarse to fine
    originals: np.ndarray
    reconstructions: Mapping[str, np.ndarray]  # "top/zeros", "top/mean", "top/prior", ..., "top+bottom/zeros"
    samples: Mapping[str, SamplesOfClass]  # class ("" without classes) -> its first samples
    rungs: Mapping[str, np.ndarray]  # rung of the quality ladder -> its first images; empty without a ladder
    codebooks: Mapping[str, np.ndarray]  # level -> its entries, each decoded alone, by use in the training images
    nearest: Sequence[NearestImages]
    nearest_distances: Mapping[str, Mapping[str, np.ndarray]]  # space -> image set -> (N,), to the nearest train image
    entry_counts: Mapping[str, Mapping[str, np.ndarray]]  # level -> split -> occurrences of each entry, (K,)
    curves: Mapping[str, Curve]  # model -> training curves
    origin: Mapping[str, str]  # what made the results: label -> text
    provenance: str  # relative path of a script with the facts of the run that computed the report: see provenance.py
    settings: Mapping[str, Any]
    digests: Mapping[str, str]  # artifact -> SHA-256 of its manifest
