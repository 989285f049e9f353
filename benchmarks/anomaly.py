"""Defects found by the prior's scores and by the reconstruction error, on validation images with planted defects.

    python benchmarks/anomaly.py --model artifacts
    python benchmarks/anomaly.py --model artifacts --picture anomaly.png    # draw one example per defect instead

Each validation image of the model's shards gets one defect. Prints the area under the ROC curve of each score, for
telling defective images from intact ones, and defective pixels from the others of the same images. 0.5 is chance.

    codes             negative log-likelihood of the codes under the priors
    unlikely codes    the same, of codes above the threshold ln K only
    restoration       absolute difference between the image and its restorations, from likely codes only
    reconstruction    squared error of the reconstruction, the usual baseline

Source: Naval Marimont and Tarroni 2021 (the first three).
Axes: N images, S x S pixels.
"""

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torchmetrics.functional.classification import binary_auroc

import vqvae2
from stages.formats.shards import open_shards
from stages.images.contact_sheet import contact_sheet
from stages.inference.heat_map import draw_heat_maps

RESTORATIONS = 4  # averaged
EXAMPLES = (3, 40, 90)  # defective image that is drawn of each defect
VISIBLE_CHANGE = 256  # sum over pixels of the mean difference of the channels, such as 16 pixels by 16 levels


def paste(image: np.ndarray, other: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Paste a square of another image, a quarter of the side, at a random place."""
    size = len(image) // 4
    top, left, from_top, from_left = generator.integers(0, len(image) - size + 1, 4)
    defective = image.copy()
    defective[top : top + size, left : left + size] = other[from_top : from_top + size, from_left : from_left + size]
    return defective, (defective != image).any(-1)


def scratch(image: np.ndarray, other: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw a straight line of one random colour, two pixels thick and half a side long."""
    side = len(image)
    angle, (row, column) = generator.uniform(0, math.pi), generator.uniform(side / 4, side * 3 / 4, 2)
    rows, columns = np.mgrid[:side, :side]
    along = (rows - row) * math.sin(angle) + (columns - column) * math.cos(angle)
    across = (rows - row) * math.cos(angle) - (columns - column) * math.sin(angle)
    defective = image.copy()
    defective[(np.abs(along) < side / 4) & (np.abs(across) < 1)] = generator.integers(0, 256, 3)
    return defective, (defective != image).any(-1)


def scramble(image: np.ndarray, other: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Shuffle the pixels of a square, a quarter of the side, at a random place."""
    size = len(image) // 4
    top, left = generator.integers(0, len(image) - size + 1, 2)
    defective = image.copy()
    square = defective[top : top + size, left : left + size].reshape(-1, 3)
    defective[top : top + size, left : left + size] = generator.permutation(square).reshape(size, size, 3)
    return defective, (defective != image).any(-1)


DEFECTS: Mapping[str, Callable[..., tuple[np.ndarray, np.ndarray]]] = {
    "paste": paste,
    "scratch": scratch,
    "scramble": scramble,
}


def plant(images: np.ndarray, defect: str, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Plant a visible defect in each image: return (N, S, S, 3) images, (N, S, S) masks, and the images' indices.

    An image that a defect leaves unchanged, such as a white square on white, is tried again, 20 times at most.
    """
    generator = np.random.default_rng(seed)
    defective, masks, indices = [], [], []
    for index, image in enumerate(images):
        for _ in range(20):
            changed, mask = DEFECTS[defect](image, images[generator.integers(len(images))], generator)
            if np.abs(changed.astype(int) - image).mean(-1).sum() > VISIBLE_CHANGE:
                defective.append(changed)
                masks.append(mask)
                indices.append(index)
                break
    return np.stack(defective), np.stack(masks), np.array(indices)


def measure(model: vqvae2.Model, images: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Compute each score: name -> (number per image, map of its pixels)."""
    codes = model.encode(images)
    scores = model.score_codes(codes)
    unlikely = replace(
        scores,
        maps={
            level: np.where(nats > math.log(model.levels[level].entries), nats, 0)
            for level, nats in scores.maps.items()
        },
    )
    reconstructions = model.decode(codes, format="numpy").astype(float)
    restored = [
        model.decode(model.restore_codes(codes, labels=scores.labels, seed=seed), format="numpy").astype(float)
        for seed in range(RESTORATIONS)
    ]
    change = np.mean([np.abs(images_of_seed - images).mean(-1) for images_of_seed in restored], axis=0)
    error = np.square(reconstructions - images).mean(-1)
    return {
        "codes": (scores.per_image, scores.heat_maps()),
        "unlikely codes": (unlikely.per_image, unlikely.heat_maps()),
        "restoration": (change.mean((1, 2)), change),
        "reconstruction": (error.mean((1, 2)), error),
    }


def draw(model: vqvae2.Model, images: np.ndarray, seed: int) -> bytes:
    """Draw one example per defect, in rows, as PNG.

    Columns: intact, defective, reconstruction, its error, scores of the codes, restoration, its change.
    """
    rows = []
    for number, defect in enumerate(DEFECTS):
        defective, _, indices = plant(images, defect, seed)
        chosen = [EXAMPLES[number] % len(defective)]
        measured = measure(model, defective[chosen])
        codes = model.encode(defective[chosen])
        heat_map = draw_heat_maps(model.score_codes(codes), model.levels)["total"]
        error, change = (_grey(measured[name][1]) for name in ("reconstruction", "restoration"))
        reconstruction = model.decode(codes, format="numpy")
        restored = model.restore(defective[chosen], format="numpy")
        intact = images[indices[chosen]]
        rows += [intact, defective[chosen], reconstruction, error, heat_map, restored, change]
    return contact_sheet(np.concatenate(rows), columns=len(rows) // len(DEFECTS), enlarge=3)


def _grey(maps: np.ndarray) -> np.ndarray:
    """Convert (N, S, S) numbers to grey images, white at the largest of each."""
    scaled = maps / np.maximum(maps.max((1, 2), keepdims=True), 1e-12)
    return np.repeat((255 * scaled).astype(np.uint8)[..., None], 3, axis=-1)


def area(positives: np.ndarray, negatives: np.ndarray) -> float:
    """Compute the area under the ROC curve."""
    scores = torch.from_numpy(np.concatenate([positives.ravel(), negatives.ravel()]))
    targets = torch.cat([torch.ones(positives.size), torch.zeros(negatives.size)]).long()
    ranks = scores.unique(return_inverse=True)[1].double() / len(scores)  # binary_auroc expects probabilities
    return float(binary_auroc(ranks, targets))


def main() -> None:
    """Print a table of areas per defect, or draw examples."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=Path("artifacts"), help="folder with shards/, vqvae/ and priors/")
    parser.add_argument("--count", type=int, default=1000, help="validation images at most")
    parser.add_argument("--seed", type=int, default=0, help="of the defects")
    parser.add_argument("--picture", type=Path, help="draw examples to this PNG file, and measure nothing")
    options = parser.parse_args()
    model = vqvae2.load(options.model)
    split = open_shards(model.folder / "shards").split("validation")
    images = np.stack([split.read(position) for position in range(min(options.count, len(split)))])
    if options.picture:
        options.picture.write_bytes(draw(model, images, options.seed))
        return
    intact = measure(model, images)
    print(f"{'defect':10}{'score':18}{'images':>8}{'pixels':>8}")
    for defect in DEFECTS:
        defective, masks, indices = plant(images, defect, options.seed)
        for name, (per_image, maps) in measure(model, defective).items():
            areas = area(per_image, intact[name][0][indices]), area(maps[masks], maps[~masks])
            print(f"{defect:10}{name:18}{areas[0]:8.3f}{areas[1]:8.3f}", flush=True)


if __name__ == "__main__":
    main()
