"""Samples on disk: images as shards, and the codes they were decoded from.

samples-{number:05d}.tar        KEY.png, and KEY.cls where there are classes; KEY is the sample's number
samples-{number:05d}.parquet    their codes, as in codes.py
grid.png                        the first samples, to look at
manifest.json                   meta: count, classes, image size, settings, the digests of the models
"""

import io
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from models.priors import Grid
from stages.errors import UserError
from stages.formats import artifact, codes
from stages.formats.artifact import Artifact
from stages.formats.codes import CodeSet

KIND = "samples"


@dataclass(frozen=True)
class Samples:
    """A folder of samples."""

    found: Artifact
    count: int
    classes: tuple[str, ...]
    image_size: int
    levels: Mapping[str, Grid]
    vqvae: str  # digest of the VQ-VAE that decoded them

    @cached_property
    def drawn(self) -> CodeSet:
        """The samples' codes and labels."""
        # The Parquet files are those of a folder of codes with the one split "samples".
        return codes.Codes(self.found, self.levels, self.classes, self.vqvae).split("samples")

    @property
    def labels(self) -> np.ndarray:
        return self.drawn.labels

    @cached_property
    def places(self) -> "dict[int, Place]":
        return places(self.found.path(name) for name in sorted(self.found.files) if name.endswith(".tar"))

    def images(self, start: int, stop: int) -> np.ndarray:
        """Decode samples [start, stop) to (N, H, W, 3) uint8."""
        return self.images_of(range(start, stop))

    def images_of(self, numbers: Iterable[int]) -> np.ndarray:
        """Decode the samples of these numbers to (N, H, W, 3) uint8."""
        wanted = [int(number) for number in numbers]
        missing = [number for number in wanted if number not in self.places]
        if missing:
            raise UserError(
                f"{len(missing)} samples are missing, first number {missing[0]}.",
                where=self.found.folder,
                fix="Run: vqvae2 run --stage sample --force",
                code=4,
            )
        return np.stack([read_image(self.places[number]) for number in wanted])


class Place(NamedTuple):
    """Where the image of a sample lies: in which tar, and at which bytes of it."""

    tar: Path
    offset: int
    length: int


def places(tars: Iterable[Path]) -> dict[int, Place]:
    """Find the images in some tars, by the samples' numbers. Do it once: every tar is read through."""
    found: dict[int, Place] = {}
    for path in tars:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                stem, _, extension = member.name.partition(".")
                if extension == "png" and stem.isdecimal():
                    found[int(stem)] = Place(path, member.offset_data, member.size)
    return found


def read_image(place: Place) -> np.ndarray:
    """Decode one image, (H, W, 3) uint8."""
    with place.tar.open("rb") as file:
        file.seek(place.offset)
        data = file.read(place.length)
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        return np.asarray(image.convert("RGB"))


def open_samples(folder: Path) -> Samples:
    """Open a folder of samples."""
    found = artifact.read(folder, KIND, "sample")
    meta = found.meta
    levels = {name: Grid(**shape) for name, shape in meta["levels"].items()}
    return Samples(found, meta["count"], tuple(meta["classes"]), meta["image_size"], levels, meta["vqvae"])
