"""`vqvae2 plan`: what a run would cost, counted on the meta device, where nothing is computed."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch

from models import cost
from models.priors import Grid, build
from models.vqvae import VQVAE
from pipeline import params
from pipeline.commands.run import compose
from pipeline.preflight import classes_of
from stages.config import DatasetConfig, Params, TrainConfig
from stages.errors import UserError


@dataclass(frozen=True)
class Training:
    """One network and its training."""

    stage: str
    parameters: int
    parameters_per_class: int  # how many of them each class of a labelled data set brings
    forward_flops: int  # per image
    training_flops: int  # in all: three times the forward pass, for each image of each step
    checkpoint_bytes: int  # weights, their moving average and Adam's two moments, as float32


def show(overrides: Sequence[str], *, as_json: bool) -> int:
    """Print the cost of composed settings, or of params.yaml as it lies."""
    settings = compose(overrides)[1] if overrides else params.load()
    known = classes(settings.dataset)
    trainings = list(count(settings, known or 0))
    codes = bytes_per_image(settings)
    if as_json:
        plan = {"classes": known, "trainings": [asdict(each) for each in trainings], "code_bytes_per_image": codes}
        print(json.dumps(plan, indent=1))
        return 0
    print(f"{'stage':<14}{'parameters':>13}{'GFLOP/image':>13}{'training FLOP':>15}{'checkpoint MB':>15}")
    for each in trainings:
        print(
            f"{each.stage:<14}{each.parameters:>13,}{each.forward_flops / 1e9:>13.3g}"
            f"{each.training_flops:>15.3g}{each.checkpoint_bytes / 1e6:>15,.1f}"
        )
    if known is None:
        added = ", ".join(f"{each.parameters_per_class:,} to {each.stage}" for each in trainings[1:])
        print(f"classes: not known before the images are here, so none are counted; each would add {added}")
    else:
        print(f"classes: {known}" if known else "classes: none, as the images have no labels")
    size = settings.dataset.image_size
    print(
        f"codes: {codes:,.0f} bytes per image of {size} x {size}, 1/{3 * size * size / codes:.0f} of its pixels' bytes"
    )
    return 0


def classes(dataset: DatasetConfig) -> int | None:
    """Count the classes by the names in the source alone; None where that cannot be read."""
    if dataset.labels == "none":
        return 0
    try:
        return len(classes_of(dataset))
    except UserError:
        return None


def count(settings: Params, classes: int) -> Iterator[Training]:
    """Count the VQ-VAE and then each prior, under labels of so many classes."""
    size = settings.dataset.image_size
    with torch.device("meta"):
        vqvae, image = VQVAE(settings.vqvae), torch.empty(1, 3, size, size)
    flops = cost.forward_flops(partial(vqvae, image))
    yield _training("vqvae", cost.parameters(vqvae), 0, flops, settings.train_vqvae)

    coarser: dict[str, Grid] = {}
    given: dict[str, torch.Tensor] = {}
    for level, side in settings.vqvae.grids(size).items():
        entries, prior = settings.vqvae.levels[level].entries, settings.priors[level]
        make = partial(build, prior.network, entries=entries, grid=(side, side), coarser=coarser)
        with torch.device("meta"):
            network, larger = make(classes=classes), make(classes=classes + 1)
            codes, labels = torch.zeros(1, side, side, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        flops = cost.forward_flops(partial(network, codes, given, labels if classes else None))
        parameters, per_class = cost.parameters(network), cost.parameters(larger) - cost.parameters(network)
        yield _training(f"prior_{level}", parameters, per_class, flops, prior.train)
        coarser[level], given[level] = Grid(entries, side, side), codes


def bytes_per_image(settings: Params) -> float:
    """Bytes that an image's codes hold when each entry is as likely as any other."""
    grids = settings.vqvae.grids(settings.dataset.image_size)
    return sum(side**2 * math.log2(settings.vqvae.levels[level].entries) for level, side in grids.items()) / 8


def _training(stage: str, parameters: int, per_class: int, flops: int, train: TrainConfig) -> Training:
    copies = 4 if train.ema_decay else 3
    training_flops = 3 * flops * train.batch_size * train.steps
    return Training(stage, parameters, per_class, flops, training_flops, 4 * copies * parameters)
