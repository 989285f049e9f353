"""Evaluation worker: runs the networks over a part, a range of images, and returns sums, features or images.

Axes: N images, H rows, W columns (of an image, or of a level's grid of codes), D features, k nearest images.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.priors import nll
from models.quantizer import Quantizer
from stages.config import SampleConfig
from stages.evaluation import ladder
from stages.evaluation.inputs import COMPARED_SETS, EvaluationInputs, EvaluationPlan
from stages.evaluation.part_files import FeatureFile, feature_name, load_or_compute, part_path
from stages.formats.codes import CodeSet
from stages.images.tensors import to_float, to_uint8
from stages.inference.trained_models import TrainedModels
from stages.mapping.parts import Part, Result
from stages.metrics import codecs, distortion, neighbours, rate
from stages.metrics.distortion import Distances, DistortionSums
from stages.metrics.features import FeatureNetwork
from stages.metrics.networks import perceptual_network, weights_file
from stages.metrics.vgg import VGG16
from stages.runtime.device import best_device

# Fills of the finer levels by codes of their priors: at random, and the most probable code at each position.
PRIOR_FILLS: dict[str, dict[str, Any]] = {"prior": {}, "mode": {"top_k": 1}}
CODES_ROWS = 1024  # images whose random codes are drawn at once
MAX_SHUFFLED_CODES = 2**23  # shuffled at once: each takes a random number and an index, 16 bytes
CODEBOOK_GRID = 4  # side in codes of the coarsest level of the grid that shows an entry alone


class EvaluationWorker:
    """Mapper of the parts of an evaluation. Each process has its own copy of the networks.

    An image set is a split of the shards ("train", "validation"), one of COMPARED_SETS, or a rung of the quality
    ladder, such as "redrawn_bottom".
    """

    def __init__(
        self, inputs: dict[str, Path], plan: EvaluationPlan, results_folder: Path, features_folder: Path | None = None
    ):
        """Create a worker. `features_folder` has the features of all image sets, for parts that need them."""
        self.inputs, self.plan, self.results_folder = EvaluationInputs(**inputs), plan, results_folder
        self.features_folder = features_folder
        self.device = best_device()
        # Each is loaded or computed on first use and then kept by this process.
        self.vqvae = cache(lambda: self.inputs.vqvae.to(self.device).to(memory_format=torch.channels_last))  # type: ignore[call-overload]
        self.prior = cache(lambda level: self.inputs.prior(level).to(self.device))
        networks = {network.name: network for network in plan.networks}
        self.feature_network = cache(lambda name: FeatureNetwork(networks[name], self.device))
        self.perceptual = cache(self._perceptual)
        self.trained_models = cache(self._trained_models)
        self.codes = lru_cache(maxsize=2)(self._codes)  # of 50,000 images, each takes hundreds of megabytes
        self.split_images = cache(self.inputs.images)
        self.queries = cache(lambda image_set: self.images(image_set, 0, plan.query_sets[image_set]))

    @torch.inference_mode()
    def __call__(self, part: Part) -> Result:
        path = part_path(self.results_folder, part)
        result = load_or_compute(path, lambda: self._compute(part))
        result.pop("features", None)  # they stay in their file
        return result

    def _compute(self, part: Part) -> dict[str, Any]:
        image_set, start, stop = part["image_set"], part["start"], part["stop"]
        match part["task"]:
            case "distortion":
                return self.distortion(image_set, start, stop)
            case "codecs":
                return self.codecs(image_set, start, stop)
            case "likelihood":
                return self.likelihood(image_set, part["level"], start, stop)
            case "features":
                return self.features(part["network"], image_set, start, stop)
            case "nearest_pixels":
                return self.nearest_pixels(start, stop)
            case "nearest_features":
                return self.nearest_features(part["network"], start, stop)
            case "examples":
                return self.examples(image_set, start, stop)
            case "codebook":
                return self.codebook(image_set, start, stop)
        raise ValueError(f"task must be one of a part of `evaluate`, got {part['task']!r}")

    def distortion(self, split: str, start: int, stop: int) -> dict[str, Any]:
        """Sum the distortion of images decoded from each prefix of levels: "top/zeros" -> DistortionSums as a list."""
        sums: dict[str, DistortionSums] = {}
        for first, last in self._batches(start, stop):
            images = to_float(torch.from_numpy(self.images(split, first, last)), self.device)
            for name, decoded in self._decode_prefixes(split, first, last):
                batch_sums = distortion.measure(images, decoded, self.perceptual())
                sums[name] = distortion.add([sums[name], batch_sums]) if name in sums else batch_sums
        return {name: list(prefix_sums) for name, prefix_sums in sums.items()}

    def codecs(self, split: str, start: int, stop: int) -> dict[str, Any]:
        """Compress images by each codec and quality: "jpeg/50" -> CodecSums as a list."""
        images = self.images(split, start, stop)
        return {
            f"{codec}/{quality}": codecs.to_list(codecs.measure(images, codec, quality, self.perceptual()))
            for codec in codecs.available()
            for quality in codecs.QUALITIES
        }

    def likelihood(self, split: str, level: str, start: int, stop: int) -> dict[str, Any]:
        """Sum the negative log-likelihood of a level's codes under its prior."""
        prior = self.prior(level)
        nats = []
        for first, last in self._batches(start, stop):
            codes = self._code_grids(split, first, last)
            labels = self.codes(split).labels[first:last]
            logits = prior(
                codes[level],
                {name: codes[name] for name in prior.coarser},
                torch.from_numpy(labels).to(self.device) if prior.classes else None,
            )
            nats.append(nll(logits, codes[level]).cpu().numpy())
        grid = self.inputs.codes.levels[level]
        return {"sums": list(rate.measure(np.concatenate(nats), grid.height * grid.width))}

    def features(self, network: str, image_set: str, start: int, stop: int) -> dict[str, np.ndarray]:
        """Compute the features, (N, D), of images; return also those images that the quality ladder shows."""
        compute = self.feature_network(network)
        features, shown = [], []
        for first, last in self._batches(start, stop):
            images = self.images(image_set, first, last)
            features.append(compute(images))
            shown.append(images[: max(0, ladder.RUNG_IMAGES - first)])
        return {"features": np.concatenate(features), "shown": np.concatenate(shown)}

    def nearest_pixels(self, start: int, stop: int) -> dict[str, Any]:
        """Search training images [start, stop) for the k nearest to each query by pixels.

        A distance is a root mean square over pixels and channels, in 8-bit levels.
        """
        images = self.images("train", start, stop)
        scale = 1 / np.sqrt(images[0].size)
        return self._nearest(self.queries, images, start, scale, self.device)

    def nearest_features(self, network: str, start: int, stop: int) -> dict[str, Any]:
        """Search training images [start, stop) for the k nearest to each query by features."""
        # The comparison of image sets may have needed the same features.
        is_saved = self.plan.feature_sets.get("train", 0) >= stop
        features = (
            self._saved_features(network, "train")[start:stop]
            if is_saved
            else self.features(network, "train", start, stop)["features"]
        )

        def queries(image_set: str) -> np.ndarray:
            return self._saved_features(network, image_set)[: self.plan.query_sets[image_set]]

        return self._nearest(queries, features, start, 1.0, "cpu")

    def _nearest(
        self,
        queries: Callable[[str], np.ndarray],
        candidates: np.ndarray,
        start: int,
        scale: float,
        device: torch.device | str,
    ) -> dict[str, np.ndarray]:
        """Search candidates for the k nearest of each query: distances and indices, (N, k), by image set."""
        result: dict[str, np.ndarray] = {}
        for image_set in self.plan.query_sets:
            distances, indices = neighbours.nearest(
                queries(image_set), candidates, self.plan.config.nearest_images, device
            )
            result |= {f"{image_set}_distances": distances * scale, f"{image_set}_indices": indices + start}
        return result

    def _saved_features(self, network: str, image_set: str) -> FeatureFile:
        assert self.features_folder
        return FeatureFile(self.features_folder / feature_name(network, image_set))

    def examples(self, split: str, start: int, stop: int) -> dict[str, Any]:
        """Return images, and what each prefix of levels decodes to with each fill: name -> uint8 (N, H, W, 3)."""
        decoded: dict[str, list[np.ndarray]] = {}
        for first, last in self._batches(start, stop):
            for name, batch in self._decode_prefixes(split, first, last):
                decoded.setdefault(name, []).append(to_uint8(batch.cpu().numpy()))
        levels = list(self.inputs.codes.levels)
        for level in levels[1:]:
            prefix = "+".join(levels[: levels.index(level)])
            for fill, rule in PRIOR_FILLS.items():
                config = SampleConfig(batch_size=self.plan.config.batch_size, **rule)
                decoded[f"{prefix}/{fill}"] = [self._redraw(split, level, start, stop, config)]
        by_prefix = sorted(decoded, key=lambda name: name.count("+"))  # shortest first
        return {
            "images": self.images(split, start, stop),
            **{name: np.concatenate(decoded[name]) for name in by_prefix},
        }

    def codebook(self, level: str, start: int, stop: int) -> dict[str, Any]:
        """Decode entries [start, stop) of a level, each alone on a small grid: uint8 (N, H, W, 3).

        Coarser levels hold the entry nearest to their mean entry, finer levels the mean entry. The image is the centre
        of the decoded grid, as far from its borders as it is large.
        """
        levels = self.inputs.codes.levels
        batches = []
        for first, last in self._batches(start, stop):
            codes = {}
            for name, grid in levels.items():
                side = CODEBOOK_GRID * grid.height // next(iter(levels.values())).height
                entries = torch.arange(first, last) if name == level else self._mean_entry(name).expand(last - first)
                codes[name] = entries[:, None, None].expand(-1, side, side).to(self.device)
                if name == level:
                    break
            decoded = to_uint8(self.vqvae().decode(codes, fill="mean").cpu().numpy())
            border = decoded.shape[1] // 4
            batches.append(decoded[:, border:-border, border:-border])
        return {"images": np.concatenate(batches)}

    def _mean_entry(self, level: str) -> Tensor:
        """Return the index of the entry nearest to the mean entry of a level: a tensor of one value."""
        quantizer: Quantizer = self.inputs.vqvae.levels[f"level_{level}"].quantizer  # type: ignore[assignment]
        return (quantizer.codebook - quantizer.mean()).square().sum(1).argmin()[None].cpu()

    def images(self, image_set: str, start: int, stop: int) -> np.ndarray:
        """Read or decode images [start, stop) of an image set: uint8 (N, H, W, 3)."""
        if image_set == "samples":
            return self.inputs.samples.images(start, stop)
        if image_set.startswith(ladder.REDRAWN):
            config = ladder.sampling_config(self.inputs.samples.artifact.meta, self.plan.config.batch_size)
            level = image_set.removeprefix(ladder.REDRAWN)
            return self._redraw(self.plan.reference, level, start, stop, config)
        if image_set in COMPARED_SETS:
            batches = [
                self.vqvae().decode(self._code_grids(image_set, first, last))
                for first, last in self._batches(start, stop)
            ]
            return to_uint8(torch.cat(batches).cpu().numpy())
        images = self.split_images(image_set)
        return np.stack([images.read(position) for position in range(start, stop)])

    def _redraw(self, split: str, level: str, start: int, stop: int, config: SampleConfig) -> np.ndarray:
        """Draw a level and all finer ones of images [start, stop), given their coarser codes: uint8 (N, H, W, 3).

        An image's draw depends on its position in the split and on the seed, not on the part that it is in.
        """
        labels = self.codes(split).labels
        batches = []
        for first, last in self._batches(start, stop):
            codes = self._code_grids(split, first, last)
            known_codes = {name: codes[name] for name in itertools.takewhile(lambda name: name != level, codes)}
            drawn = self.trained_models().draw_codes(
                range(first, last), labels[first:last].tolist(), config, self.plan.seed, known_codes=known_codes
            )
            batches.append(self.vqvae().decode(drawn).float().cpu().numpy())
        return to_uint8(np.concatenate(batches))

    def _perceptual(self) -> Distances | None:
        """Return the perceptual distance, if the networks of the evaluation have one."""
        network = perceptual_network(self.plan.networks)
        return VGG16(weights_file(network.name, network.weights), self.device).distances if network else None

    def _trained_models(self) -> TrainedModels:
        codes = self.inputs.codes
        meta = {"image_size": self.inputs.shards.image_size, "classes": codes.classes, "label_counts": []}
        return TrainedModels(self.vqvae(), {level: self.prior(level) for level in codes.levels}, meta, {})

    def _codes(self, image_set: str) -> CodeSet:
        """Read or draw the codes that an image set is decoded from."""
        if image_set not in COMPARED_SETS:
            count = max(self.plan.config.max_images, self.plan.num_examples)
            return self.inputs.codes_of_first_images(image_set, count)
        real = self.codes(self.plan.reference).take(np.arange(self.plan.num_compared))
        if image_set == "reconstructions":
            return real
        generator = np.random.default_rng([self.plan.seed, COMPARED_SETS.index(image_set)])
        levels = self.inputs.codes.levels
        baseline = {
            level: random_codes(grids, levels[level].entries, generator)
            if image_set == "random_codes"
            else shuffle_codes(grids, generator)
            for level, grids in real.codes.items()
        }
        return CodeSet(baseline, real.labels, real.copies, real.keys)

    def _code_grids(self, image_set: str, start: int, stop: int) -> dict[str, Tensor]:
        """Return codes [start, stop) of an image set on the device: level -> int64 (N, H, W), coarse to fine."""
        return {
            level: torch.from_numpy(grids[start:stop].astype(np.int64)).to(self.device)
            for level, grids in self.codes(image_set).codes.items()
        }

    def _decode_prefixes(self, split: str, start: int, stop: int) -> Iterator[tuple[str, Tensor]]:
        """Decode each prefix of levels, coarse to fine, with each fill of the finer levels: "top/zeros", "top/mean"."""
        levels = list(self.inputs.codes.levels)
        codes = self._code_grids(split, start, stop)
        with_zeros = self.vqvae().decode_prefixes(codes)
        # The prefix of all levels leaves nothing to fill, so it is decoded once only.
        with_mean = self.vqvae().decode_prefixes({level: codes[level] for level in levels[:-1]}, fill="mean")
        for index in range(len(levels)):
            prefix = "+".join(levels[: index + 1])
            yield f"{prefix}/zeros", with_zeros[index]
            if index < len(with_mean):
                yield f"{prefix}/mean", with_mean[index]

    def _batches(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        size = self.plan.config.batch_size
        return ((first, min(first + size, stop)) for first in range(start, stop, size))


def random_codes(grids: np.ndarray, entries: int, generator: np.random.Generator) -> np.ndarray:
    """Draw uniformly random codes of the shape and type of `grids`, (N, H, W)."""
    codes = np.empty_like(grids)
    for start in range(0, len(grids), CODES_ROWS):  # in pieces, which are the same numbers: they are drawn as int64
        rows = codes[start : start + CODES_ROWS]
        rows[:] = generator.integers(entries, size=rows.shape)
    return codes


def shuffle_codes(grids: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Give each position of each image the code that another random image has at this position: (N, H, W).

    The histogram of codes at each position stays the same; the dependence between positions is lost.
    """
    codes = grids.reshape(len(grids), -1)  # (N, HW)
    shuffled = np.empty_like(codes)
    positions = max(1, MAX_SHUFFLED_CODES // len(codes))
    for start in range(0, codes.shape[1], positions):
        block = codes[:, start : start + positions]
        # Sort the images into a random cycle per position and give each image its predecessor's code: with two or more
        # images, none keeps its own. A random permutation would leave some in place.
        cycle = np.argsort(generator.random(block.shape), axis=0)
        predecessors = np.take_along_axis(block, np.roll(cycle, 1, axis=0), axis=0)
        np.put_along_axis(shuffled[:, start : start + positions], cycle, predecessors, axis=0)
    return shuffled.reshape(grids.shape)
