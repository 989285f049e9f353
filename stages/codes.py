"""Turn images into codes with a trained VQ-VAE.

reads   shards   image shards                       formats/shards.py
        vqvae    trained VQ-VAE                     formats/model_file.py
writes  out      one row of codes per image         formats/codes.py

Axes: B images, H x W pixels, 3 RGB channels.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.priors import Grid
from models.vqvae import VQVAE
from stages.config import AugmentConfig, CodesConfig
from stages.errors import UserError
from stages.formats import artifact, model_file
from stages.formats.codes import KIND, write_codes_file
from stages.formats.shards import ImageSet, ShardRef, Shards, open_shards, read_shard
from stages.images.augment import augment as augment_image
from stages.images.tensors import to_float
from stages.mapping.parts import map_parts
from stages.runtime.context import StageContext
from stages.runtime.device import best_device


def run(
    shards: Path,
    vqvae: Path,
    out: Path,
    *,
    codes: CodesConfig,
    augment: AugmentConfig,
    seed: int,
    context: StageContext,
) -> None:
    """Encode every image of every split, and `codes.copies` - 1 augmented copies of each training image.

    Raises UserError if the VQ-VAE does not quantize, or if an input is damaged.
    """
    images = open_shards(shards)
    network, model = model_file.load_vqvae(vqvae)
    _check_quantizes(network)
    if model.meta["shards"] != images.digest:
        context.reporter.message("The VQ-VAE was trained on other shards than these.")
    levels = {
        name: Grid(level.entries, *2 * (images.image_size // level.stride,))
        for name, level in network.config.levels.items()
    }

    work = context.work_dir / "parts"
    work.mkdir(parents=True, exist_ok=True)
    arguments = (vqvae.absolute(), codes, augment, seed, levels, model.digest, work.absolute())
    results = map_parts(Encode, arguments, _parts(images, codes), context=context, unit="image")

    meta = {
        "levels": {name: level._asdict() for name, level in levels.items()},
        "classes": list(images.classes),
        "vqvae": model.digest,
        "shards": images.digest,
    }
    hashes: dict[str, str] = {}
    with artifact.commit_folder(out, KIND, meta, hashes) as folder:
        for result in results:
            artifact.link_or_copy(work / result["file"], folder / result["file"])
            hashes[result["file"]] = artifact.recorded_checksum(work / result["file"])


class Encode:
    """Mapper that encodes the images of one shard per part, with a VQ-VAE loaded once per process."""

    def __init__(
        self,
        vqvae: Path,
        codes: CodesConfig,
        augment: AugmentConfig,
        seed: int,
        levels: dict[str, Grid],
        vqvae_digest: str,
        out: Path,
    ):
        self.device = best_device()
        network, _ = model_file.load_vqvae(vqvae)
        self.network = network.to(self.device)
        self.codes, self.augment, self.seed = codes, augment, seed
        self.levels, self.vqvae_digest, self.out = levels, vqvae_digest, out

    def __call__(self, part: dict[str, Any]) -> dict[str, Any]:
        shard = ShardRef(**part["shard"])
        images = read_shard(shard)
        path = self.out / Path(shard.shard).with_suffix(".parquet").name
        count, copies = len(images), part["copies"]
        if not artifact.has_valid_checksum(path):
            grids = [self._encode(images, copy) for copy in range(copies)]
            write_codes_file(
                path,
                self.levels,
                {name: np.concatenate([grid[name] for grid in grids]) for name in self.levels},
                np.tile(images.labels, copies),
                np.repeat(np.arange(copies), count),
                [str(key) for key in images.keys] * copies,
                {"levels": {name: level._asdict() for name, level in self.levels.items()}, "vqvae": self.vqvae_digest},
            )
            artifact.write_checksum(path)
        return {"file": path.name}

    @torch.inference_mode()
    def _encode(self, images: ImageSet, copy: int) -> dict[str, np.ndarray]:
        """Encode one copy of each image. Return (B, H, W) uint16 codes per level."""
        codes: dict[str, list[np.ndarray]] = {name: [] for name in self.levels}
        for start in range(0, len(images), self.codes.batch_size):
            positions = range(start, min(start + self.codes.batch_size, len(images)))
            batch = np.stack([self._read(images, position, copy) for position in positions])  # (B, H, W, 3) uint8
            for name, grids in self.network.encode(to_float(torch.from_numpy(batch), self.device)).items():
                codes[name].append(grids.cpu().numpy().astype(np.uint16))
        return {name: np.concatenate(batches) for name, batches in codes.items()}

    def _read(self, images: ImageSet, position: int, copy: int) -> np.ndarray:
        """Read an image; augment it unless `copy` is 0."""
        image = images.read(position)
        # The image's key is part of the seed, its position in the shard is not: codes do not depend on the shard size.
        return augment_image(image, self.augment, self.seed, int(images.keys[position]), copy) if copy else image


def _check_quantizes(network: VQVAE) -> None:
    """Raise UserError for a VQ-VAE without codebooks."""
    if network.config.quantizer.mode == "none":
        raise UserError(
            "This VQ-VAE does not quantize, so it has no codes.",
            where="params.yaml: vqvae.quantizer.mode",
            fix="Set vqvae.quantizer.mode to ema or loss. Or, for a report of the reconstructions, run: vqvae2 run",
            code=2,
        )


def _parts(images: Shards, codes: CodesConfig) -> list[dict[str, Any]]:
    """Describe one part per shard. Its weight is its number of rows."""
    parts = []
    for shard in images.shard_refs():
        copies = codes.copies if shard.split == "train" else 1
        parts.append({"shard": shard._asdict(), "copies": copies, "weight": shard.images * copies})
    return parts
