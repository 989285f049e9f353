"""What one worker of `evaluate` does: run a network over a range of images, and hand back sums, features or pictures.

Every part's result lies in a file named after the part, so a run that was interrupted measures only what is missing.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from models.priors import Prior, nll
from models.vqvae import VQVAE
from stages.config import EvaluateConfig
from stages.errors import UserError
from stages.formats import artifact, model_file
from stages.formats.codes import Codes, CodeSet, joined, open_codes
from stages.formats.samples import Samples, open_samples
from stages.formats.shards import ImageSet, Shards, open_shards
from stages.images.contact_sheet import to_uint8
from stages.images.tensors import to_float
from stages.mapping.parts import Part, Result, pack, unpack
from stages.metrics import distortion, neighbours, rate
from stages.metrics.features import FeatureNetwork

SETS = ("samples", "reconstructions", "random_codes", "shuffled_codes")  # held against the reference images
Fill = Literal["zeros", "mean"]


@dataclass(frozen=True)
class Inputs:
    """The artifacts that are measured, each opened when it is first asked for."""

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
        """Refuse damaged samples, and what another VQ-VAE made: its codes mean nothing to this one."""
        here = artifact.read(self.vqvae_folder, "vqvae", "vqvae").digest
        made = {"codes": (self.codes.vqvae, self.codes_folder), "sample": (self.samples.vqvae, self.samples_folder)}
        for level in self.codes.levels:
            folder = self.priors_folder / level
            made[f"prior_{level}"] = artifact.read(folder, "prior", f"prior_{level}").meta["vqvae"], folder
        for stage, (vqvae, folder) in made.items():
            if vqvae != here:
                raise UserError(
                    f"{folder.name} was made with VQ-VAE {vqvae[:12]}, but this one is {here[:12]}.",
                    where=folder,
                    fix=f"Run: vqvae2 run --stage {stage}",
                    code=5,
                )
        self.samples.found.verify()  # the others are checked where they are read

    def images(self, split: str) -> ImageSet:
        return self.shards.split(split)

    def plain_codes(self, split: str, count: int) -> CodeSet:
        """The codes of a split's first images as they are, in the images' order; reads no further than they reach."""
        keys = self.images(split).keys[:count].tolist()
        rows: dict[str, int] = {}
        parts: list[CodeSet] = []
        for part in self.codes.parts(split):
            parts.append(part.plain())
            rows |= {key: row for row, key in enumerate(parts[-1].keys, len(rows))}
            if len(rows) >= len(keys):
                break
        missing = [key for key in keys if key not in rows]
        if missing:
            raise UserError(
                f"The codes hold no image {missing[0]} of the {split} images: they come from other shards.",
                where=self.codes_folder,
                fix="Run: vqvae2 run --stage codes",
                code=4,
            )
        return joined(parts).take(np.array([rows[key] for key in keys], dtype=np.int64))


@dataclass(frozen=True)
class Plan:
    """What every part of one evaluation has in common."""

    reference: str  # the split that samples are held against
    compared: int  # N: images of every set that is compared
    queries: int  # images of a set whose nearest training images are looked for
    shown: int  # reconstructions to look at
    config: EvaluateConfig
    seed: int


class Measurer:
    """A worker's own copy of the networks, called on one part after another."""

    def __init__(self, inputs: dict[str, Path], plan: Plan, work: Path):
        self.inputs, self.plan, self.work = Inputs(**inputs), plan, work
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.vqvae = cache(lambda: self.inputs.vqvae.to(self.device).to(memory_format=torch.channels_last))  # type: ignore[call-overload]
        self.prior = cache(lambda level: self.inputs.prior(level).to(self.device))
        self.network = cache(lambda: FeatureNetwork(plan.config.feature_weights, self.device))
        self.codes = cache(self._codes)
        self.image_set = cache(self.inputs.images)
        self.queries = cache(lambda of: self.images(of, 0, plan.queries))

    @torch.inference_mode()
    def __call__(self, part: Part) -> Result:
        measure, of, start, stop = part["measure"], part["of"], part["start"], part["stop"]
        kept = self.work / f"{measure}-{of}-{start}-{stop}.npz"
        if not artifact.is_sealed(kept):
            measures: dict[str, Callable[[str, int, int], dict[str, Any]]] = {
                "distortion": self.distortion,
                "likelihood": self.likelihood,
                "features": self.features,
                "nearest": self.nearest,
                "shown": self.shown,
            }
            with artifact.atomic_write(kept) as temporary:
                temporary.write_bytes(pack(measures[measure](of, start, stop)))
            artifact.seal(kept)
        return unpack(kept.read_bytes())

    def distortion(self, split: str, start: int, stop: int) -> dict[str, Any]:
        """Hold images against what each prefix of levels decodes to, finer levels filled with zeros or their mean."""
        names = list(self.inputs.codes.levels)
        sums: dict[str, distortion.DistortionSums] = {}
        for first, last in self._batches(start, stop):
            pixels = self._pixels(self.images(split, first, last))
            for count in range(1, len(names) + 1):
                for fill in _fills(count, names):
                    decoded = self._decode(split, first, last, names[:count], fill)
                    found = distortion.measure(pixels, decoded)
                    name = f"{prefix(names[:count])}/{fill}"
                    sums[name] = distortion.add([sums[name], found]) if name in sums else found
        return {name: list(found) for name, found in sums.items()}

    def likelihood(self, of: str, start: int, stop: int) -> dict[str, Any]:
        """Score a level's codes under its prior; `of` is "split.level"."""
        split, level = of.split(".", 1)
        prior = self.prior(level)
        nats = []
        for first, last in self._batches(start, stop):
            codes = self._grids(split, first, last)
            labels = self.codes(split).labels[first:last]
            logits = prior(
                codes[level],
                {name: codes[name] for name in prior.coarser},
                torch.from_numpy(labels).to(self.device) if prior.classes else None,
            )
            nats.append(nll(logits, codes[level]).cpu().numpy())
        shape = self.inputs.codes.levels[level]
        return {"sums": list(rate.measure(np.concatenate(nats), shape.height * shape.width))}

    def features(self, of: str, start: int, stop: int) -> dict[str, Any]:
        """See images of a split or of one of the sets as the feature network does."""
        network = self.network()
        found = [network(self.images(of, first, last)) for first, last in self._batches(start, stop)]
        return {"features": np.concatenate(found)}

    def nearest(self, of: str, start: int, stop: int) -> dict[str, Any]:
        """Find, among some training images, those whose pixels are nearest to each image of a set."""
        queries = self.queries(of)
        distances, indices = neighbours.nearest(
            queries, self.images("train", start, stop), self.plan.config.nearest_images
        )
        values = queries[0].size
        return {"distances": distances / np.sqrt(values), "indices": indices + start}  # root mean square, 8-bit levels

    def shown(self, split: str, start: int, stop: int) -> dict[str, Any]:
        """Draw what each prefix of levels decodes to."""
        names = list(self.inputs.codes.levels)
        drawn = {
            f"{prefix(names[:count])}/{fill}": to_uint8(
                self._decode(split, start, stop, names[:count], fill).cpu().numpy()
            )
            for count in range(1, len(names) + 1)
            for fill in _fills(count, names)
        }
        return {"images": self.images(split, start, stop), **drawn}

    def images(self, of: str, start: int, stop: int) -> np.ndarray:
        """Read or decode images, uint8 (N, H, W, 3), of a split or of a set."""
        if of == "samples":
            return self.inputs.samples.images(start, stop)
        if of in SETS:
            return to_uint8(self._decode(of, start, stop, list(self.inputs.codes.levels), "zeros").cpu().numpy())
        found = self.image_set(of)
        return np.stack([found.read(position) for position in range(start, stop)])

    def _codes(self, of: str) -> CodeSet:
        """The codes behind a split or a set, made once per worker."""
        if of not in SETS:
            return self.inputs.plain_codes(of, max(self.plan.config.max_images, self.plan.shown))
        real = self.codes(self.plan.reference).take(np.arange(self.plan.compared))
        if of == "reconstructions":
            return real
        generator = np.random.default_rng([self.plan.seed, SETS.index(of)])
        levels = self.inputs.codes.levels
        made = {
            level: generator.integers(levels[level].entries, size=grids.shape)
            if of == "random_codes"
            else shuffled(grids, generator)
            for level, grids in real.codes.items()
        }
        return CodeSet(made, real.labels, real.copies, real.keys)

    def _grids(self, of: str, start: int, stop: int) -> dict[str, Tensor]:
        return {
            level: torch.from_numpy(grids[start:stop].astype(np.int64)).to(self.device)
            for level, grids in self.codes(of).codes.items()
        }

    def _decode(self, of: str, start: int, stop: int, levels: list[str], fill: Fill) -> Tensor:
        decoded = []
        for first, last in self._batches(start, stop):
            codes = self._grids(of, first, last)
            decoded.append(self.vqvae().decode({level: codes[level] for level in levels}, fill=fill))
        return torch.cat(decoded)

    def _pixels(self, images: np.ndarray) -> Tensor:
        return to_float(torch.from_numpy(images), self.device)

    def _batches(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        size = self.plan.config.batch_size
        return ((first, min(first + size, stop)) for first in range(start, stop, size))


def prefix(levels: list[str]) -> str:
    """Name the first levels, coarse to fine."""
    return "+".join(levels)


def shuffled(grids: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Give each position the code that another image, drawn at random, has there: `(N, H, W)`.

    How often an entry occurs at a position stays the same; how codes hang together is lost.
    """
    flat = grids.reshape(len(grids), -1)
    # Images stand in a random circle per position and each takes its neighbour's code, so that none keeps its own.
    circle = np.argsort(generator.random(flat.shape), axis=0)
    made = np.empty_like(flat)
    np.put_along_axis(made, circle, np.take_along_axis(flat, np.roll(circle, 1, axis=0), axis=0), axis=0)
    return made.reshape(grids.shape)


def _fills(count: int, names: list[str]) -> tuple[Fill, ...]:
    return ("zeros", "mean") if count < len(names) else ("zeros",)  # nothing is left to fill
