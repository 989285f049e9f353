"""Inputs and plan of an evaluation: the artifacts to evaluate, and the settings that all parts share."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from models.priors import Prior
from models.vqvae import VQVAE
from stages.config import EvaluateConfig
from stages.errors import UserError
from stages.formats import artifact, model_file
from stages.formats.codes import Codes, CodeSet, concatenate, open_codes
from stages.formats.samples import Samples, open_samples
from stages.formats.shards import ImageSet, Shards, open_shards
from stages.metrics.networks import Network
from stages.runtime.verification import verify_once

# Image sets that are compared with the reference images; the last two are baselines.
COMPARED_SETS = ("samples", "reconstructions", "random_codes", "shuffled_codes")


MIN_VALIDATION_IMAGES = 64  # with fewer, and more training images, the training images are the reference


def has_few_validation_images(sizes: Mapping[str, int]) -> bool:
    """Return whether the validation images are too few to compare with; `sizes` are the images of each split."""
    return sizes["validation"] < min(MIN_VALIDATION_IMAGES, sizes["train"])


def choose_references(reference: str, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Return the splits that `evaluate.reference` stands for."""
    automatic = "train" if has_few_validation_images(sizes) else "validation"
    return {"auto": (automatic,), "both": ("validation", "train")}.get(reference, (reference,))


@dataclass(frozen=True)
class EvaluationInputs:
    """Folders of the artifacts to evaluate. Each artifact is opened on first use."""

    shards_folder: Path
    vqvae_folder: Path
    codes_folder: Path
    priors_folder: Path
    samples_folder: Path

    @cached_property
    def shards(self) -> Shards:
        return open_shards(self.shards_folder)

    @cached_property
    def vqvae(self) -> VQVAE:
        return model_file.load_vqvae(self.vqvae_folder)[0]

    @cached_property
    def codes(self) -> Codes:
        return open_codes(self.codes_folder)

    @cached_property
    def samples(self) -> Samples:
        return open_samples(self.samples_folder)

    def prior(self, level: str) -> Prior:
        return model_file.load_prior(self.priors_folder / level, level)[0]

    def check(self) -> None:
        """Raise UserError if the samples are damaged, or if an artifact was made with another VQ-VAE.

        The codes of one VQ-VAE have no meaning for another.
        """
        expected = artifact.read(self.vqvae_folder, "vqvae", "vqvae").digest
        digests = {"codes": (self.codes.vqvae, self.codes_folder), "sample": (self.samples.vqvae, self.samples_folder)}
        for level in self.codes.levels:
            folder = self.priors_folder / level
            digests[f"prior_{level}"] = artifact.read(folder, "prior", f"prior_{level}").meta["vqvae"], folder
        for stage, (digest, folder) in digests.items():
            if digest != expected:
                raise UserError(
                    f"{folder.name} must be made with VQ-VAE {expected[:12]}, got VQ-VAE {digest[:12]}.",
                    where=folder,
                    fix=f"Run: vqvae2 run --stage {stage}",
                    code=5,
                )
        # Only the samples are verified here: the other formats verify what they read, as they read it.
        verify_once(self.samples.artifact)

    def images(self, split: str) -> ImageSet:
        return self.shards.split(split)

    def codes_of_first_images(self, split: str, count: int) -> CodeSet:
        """Return the codes of the first `count` images of a split, without augmented copies, in the images' order.

        Reads only as many files as needed. Raises UserError if an image has no codes.
        """
        keys = self.images(split).keys[:count].tolist()
        row_by_key: dict[str, int] = {}
        code_sets: list[CodeSet] = []
        for codes_of_file in self.codes.by_file(split):
            originals = codes_of_file.originals()
            code_sets.append(originals)
            row_by_key |= {key: row for row, key in enumerate(originals.keys, len(row_by_key))}
            if len(row_by_key) >= len(keys):
                break
        missing = [key for key in keys if key not in row_by_key]
        if missing:
            raise UserError(
                f"The codes have no row for {split} image {missing[0]}: they were computed from other shards.",
                where=self.codes_folder,
                fix="Run: vqvae2 run --stage codes",
                code=4,
            )
        return concatenate(code_sets).take(np.array([row_by_key[key] for key in keys], dtype=np.int64))


@dataclass(frozen=True)
class EvaluationPlan:
    """Settings that all parts of one evaluation share."""

    references: tuple[str, ...]  # splits that image sets are compared with; reconstructions are those of the first
    query_sets: Mapping[str, int]  # sets whose nearest training images are searched -> number of images, the first ones
    num_compared: int  # N: images of each compared set
    num_searched: int  # training images that are searched
    num_examples: int  # reconstructions shown in the report
    num_rated: int  # images of each point of rate and distortion, the first of the reference
    num_ladder: int  # images of each rung of the quality ladder; 0 without it
    redrawn_levels: tuple[str, ...]  # coarsest drawn level of each rung whose coarser levels are real
    networks: tuple[Network, ...]  # the first one's metrics are the headline
    config: EvaluateConfig
    seed: int

    @property
    def reference(self) -> str:
        """The split that image sets are compared with first."""
        return self.references[0]

    @property
    def feature_sets(self) -> dict[str, int]:
        """Image sets whose features are computed, and the number of their images."""
        sizes = dict.fromkeys((*self.references, *COMPARED_SETS), self.num_compared)
        # The rungs of the quality ladder are compared with reference images that follow those of the first rung.
        sizes[self.reference] = max(self.num_compared, 2 * self.num_ladder)
        return sizes | {name: max(count, sizes.get(name, 0)) for name, count in self.query_sets.items()}
