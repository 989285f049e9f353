"""Samples on disk: images as shards, and the codes they were decoded from.

samples-{number:05d}.tar        KEY.png, KEY.json, and KEY.cls with classes; KEY is the sample's number
samples-{number:05d}.parquet    their codes, as in codes.py
grid.png                        contact sheet of the first samples
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
from stages.formats import artifact
from stages.formats.artifact import Artifact
from stages.formats.codes import Codes, CodeSet

KIND = "samples"


@dataclass(frozen=True)
class Samples:
    """Handle of a folder of samples."""

    artifact: Artifact
    count: int
    classes: tuple[str, ...]
    image_size: int  # side in pixels
    levels: Mapping[str, Grid]  # coarse to fine
    vqvae: str  # digest of the VQ-VAE that decoded the samples

    @cached_property
    def codes(self) -> CodeSet:
        """Codes and labels of all samples. Raises UserError if a file is damaged."""
        # The Parquet files are those of a folder of codes with a single split, "samples".
        return Codes(self.artifact, self.levels, self.classes, self.vqvae).split("samples")

    @property
    def labels(self) -> np.ndarray:
        """Labels of all samples, (count,) int64; -1 without classes."""
        return self.codes.labels

    @cached_property
    def _tar_members(self) -> "dict[int, TarMember]":
        return index_tars(self.artifact.path(name) for name in sorted(self.artifact.files) if name.endswith(".tar"))

    def images(self, start: int, stop: int) -> np.ndarray:
        """Read the images of samples [start, stop), (N, H, W, 3) uint8. Raises UserError as `read_images`."""
        return self.read_images(range(start, stop))

    def read_images(self, sample_numbers: Iterable[int]) -> np.ndarray:
        """Read the images of these samples, (N, H, W, 3) uint8. Raises UserError if a sample is missing."""
        numbers = [int(number) for number in sample_numbers]
        missing = [number for number in numbers if number not in self._tar_members]
        if missing:
            raise UserError(
                f"{len(missing)} samples are missing, first number {missing[0]}.",
                where=self.artifact.folder,
                fix="Run: vqvae2 run --stage sample --force",
                code=4,
            )
        return np.stack([read_image(self._tar_members[number]) for number in numbers])


class TarMember(NamedTuple):
    """Location of a file's contents in a tar."""

    tar: Path
    offset: int  # bytes
    length: int  # bytes


def index_tars(tars: Iterable[Path]) -> dict[int, TarMember]:
    """Return the location of each image by sample number. Reads every header of every tar, so keep the result."""
    members: dict[int, TarMember] = {}
    for path in tars:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                stem, _, extension = member.name.partition(".")
                if extension == "png" and stem.isdecimal():
                    members[int(stem)] = TarMember(path, member.offset_data, member.size)
    return members


def read_image(member: TarMember) -> np.ndarray:
    """Read one image, (H, W, 3) uint8."""
    with member.tar.open("rb") as file:
        file.seek(member.offset)
        data = file.read(member.length)
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        return np.asarray(image.convert("RGB"))


def open_samples(folder: Path) -> Samples:
    """Open a folder of samples. Raises UserError if it is missing or incomplete."""
    samples_artifact = artifact.read(folder, KIND, "sample")
    meta = samples_artifact.meta
    levels = {name: Grid(**grid) for name, grid in meta["levels"].items()}
    return Samples(samples_artifact, meta["count"], tuple(meta["classes"]), meta["image_size"], levels, meta["vqvae"])
