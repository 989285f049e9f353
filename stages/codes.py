"""Turn images into codes with a trained VQ-VAE.

reads   shards   image shards                       formats/shards.py
        vqvae    trained VQ-VAE                     formats/model_file.py
writes  out      one row of codes per image         formats/codes.py
        metrics  rows, bytes and bits per code      formats/curves.py
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.priors import Grid
from stages.config import AugmentConfig, CodesConfig
from stages.errors import UserError
from stages.formats import artifact, curves, model_file
from stages.formats.codes import KIND, write_part
from stages.formats.shards import Part, open_shards, read_part
from stages.images.augment import augment as augmented
from stages.images.tensors import to_float
from stages.mapping.parts import map_parts
from stages.runtime.context import StageContext


def run(
    shards: Path,
    vqvae: Path,
    out: Path,
    metrics: Path,
    *,
    codes: CodesConfig,
    augment: AugmentConfig,
    seed: int,
    context: StageContext,
) -> None:
    """Encode every image of every split; training images also in augmented copies, if asked for."""
    images = open_shards(shards)
    network, model = model_file.load_vqvae(vqvae)
    if network.config.quantizer.mode == "none":
        raise UserError(
            "This VQ-VAE does not quantize, so it has no codes.",
            where="params.yaml: vqvae.quantizer.mode",
            fix="Use ema or loss to train priors.",
            code=2,
        )
    if model.meta["shards"] != images.digest:
        context.reporter.note("These shards are not those the VQ-VAE was trained on.")
    levels = {
        name: Grid(level.entries, *2 * (images.image_size // level.stride,))
        for name, level in network.config.levels.items()
    }
    parts = [
        {
            "shard": part._asdict(),
            "copies": codes.copies if part.split == "train" else 1,
            "weight": len(read_part(part)) * (codes.copies if part.split == "train" else 1),
        }
        for part in images.parts()
    ]
    work = context.work / "parts"
    work.mkdir(parents=True, exist_ok=True)
    arguments = (vqvae.absolute(), codes, augment, seed, levels, model.digest, work.absolute())
    written = map_parts(Encode, arguments, parts, context=context, unit="image")

    meta = {
        "levels": {name: level._asdict() for name, level in levels.items()},
        "classes": list(images.classes),
        "vqvae": model.digest,
        "shards": images.digest,
    }
    with artifact.commit_folder(out, KIND, meta) as folder:
        for result in written:
            artifact.link_or_copy(work / result["file"], folder / result["file"])
    rows, size = sum(result["rows"] for result in written), sum(result["bytes"] for result in written)
    per_row = sum(level.height * level.width for level in levels.values())
    bits = [level.height * level.width * math.log2(level.entries) for level in levels.values()]
    curves.write_metrics(
        metrics,
        {
            "rows": rows,
            "bytes": size,
            "bits_per_code": 8 * size / (rows * per_row),
            "bits_per_code_limit": sum(bits) / per_row,  # log2 of the entries: what even use would need
        },
    )


class Encode:
    """A worker's own VQ-VAE: built once, called on every shard."""

    def __init__(
        self,
        vqvae: Path,
        codes: CodesConfig,
        augment: AugmentConfig,
        seed: int,
        levels: dict[str, Grid],
        fingerprint: str,
        out: Path,
    ):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        network, _ = model_file.load_vqvae(vqvae)
        self.network = network.to(self.device)
        self.codes, self.augment, self.seed = codes, augment, seed
        self.levels, self.fingerprint, self.out = levels, fingerprint, out

    def __call__(self, part: dict[str, Any]) -> dict[str, Any]:
        shard = Part(**part["shard"])
        images = read_part(shard)
        path = self.out / Path(shard.shard).with_suffix(".parquet").name
        count, copies = len(images), part["copies"]
        if not artifact.is_sealed(path):
            grids = [self._encode(images, range(count), copy) for copy in range(copies)]
            write_part(
                path,
                self.levels,
                {name: np.concatenate([grid[name] for grid in grids]) for name in self.levels},
                np.tile(images.labels, copies),
                np.repeat(np.arange(copies), count),
                [str(key) for key in images.keys] * copies,
                {"levels": {name: level._asdict() for name, level in self.levels.items()}, "vqvae": self.fingerprint},
            )
            artifact.seal(path)
        return {"file": path.name, "rows": count * copies, "bytes": path.stat().st_size}

    @torch.inference_mode()
    def _encode(self, images: Any, numbers: range, copy: int) -> dict[str, np.ndarray]:
        encoded: dict[str, list[np.ndarray]] = {name: [] for name in self.levels}
        for start in range(0, len(numbers), self.codes.batch_size):
            batch = [self._image(images, number, copy) for number in numbers[start : start + self.codes.batch_size]]
            codes = self.network.encode(to_float(torch.from_numpy(np.stack(batch)), self.device))
            for name, grid in codes.items():
                encoded[name].append(grid.cpu().numpy().astype(np.uint16))
        return {name: np.concatenate(grids) for name, grids in encoded.items()}

    def _image(self, images: Any, number: int, copy: int) -> np.ndarray:
        image = images.read(number)
        # Seeded by the image's key, so that the codes do not depend on how images fall into shards.
        return augmented(image, self.augment, self.seed, int(images.keys[number]), copy) if copy else image
