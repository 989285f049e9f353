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
from pipeline.run import compose
from stages.config import Params, TrainConfig


@dataclass(frozen=True)
class Training:
    """One network and its training. Priors are counted without labels, which add a little to each."""

    stage: str
    parameters: int
    forward_flops: int  # per image
    training_flops: int  # in all: three times the forward pass, for each image of each step
    checkpoint_bytes: int  # weights, their moving average and Adam's two moments, as float32


def show(overrides: Sequence[str], *, as_json: bool) -> int:
    """Print the cost of composed settings, or of params.yaml as it lies."""
    settings = compose(overrides)[1] if overrides else params.load()
    trainings = list(count(settings))
    codes = bytes_per_image(settings)
    if as_json:
        print(json.dumps({"trainings": [asdict(each) for each in trainings], "code_bytes_per_image": codes}, indent=1))
        return 0
    print(f"{'stage':<14}{'parameters':>13}{'GFLOP/image':>13}{'training FLOP':>15}{'checkpoint MB':>15}")
    for each in trainings:
        print(
            f"{each.stage:<14}{each.parameters:>13,}{each.forward_flops / 1e9:>13.3g}"
            f"{each.training_flops:>15.3g}{each.checkpoint_bytes / 1e6:>15,.1f}"
        )
    size = settings.dataset.image_size
    print(
        f"codes: {codes:,.0f} bytes per image of {size} x {size}, 1/{3 * size * size / codes:.0f} of its pixels' bytes"
    )
    return 0


def count(settings: Params) -> Iterator[Training]:
    """Count the VQ-VAE and then each prior."""
    size = settings.dataset.image_size
    with torch.device("meta"):
        vqvae, image = VQVAE(settings.vqvae), torch.empty(1, 3, size, size)
    flops = cost.forward_flops(partial(vqvae, image))
    yield _training("vqvae", cost.parameters(vqvae), flops, settings.train_vqvae)

    coarser: dict[str, Grid] = {}
    given: dict[str, torch.Tensor] = {}
    for level, side in settings.vqvae.grids(size).items():
        entries, prior = settings.vqvae.levels[level].entries, settings.priors[level]
        with torch.device("meta"):
            network = build(prior.network, entries=entries, grid=(side, side), coarser=coarser, classes=0)
            codes = torch.zeros(1, side, side, dtype=torch.int64)
        flops = cost.forward_flops(partial(network, codes, given))
        yield _training(f"prior_{level}", cost.parameters(network), flops, prior.train)
        coarser[level], given[level] = Grid(entries, side, side), codes


def bytes_per_image(settings: Params) -> float:
    """Bytes that an image's codes hold when each entry is as likely as any other."""
    grids = settings.vqvae.grids(settings.dataset.image_size)
    return sum(side**2 * math.log2(settings.vqvae.levels[level].entries) for level, side in grids.items()) / 8


def _training(stage: str, parameters: int, flops: int, train: TrainConfig) -> Training:
    copies = 4 if train.averaging else 3
    return Training(stage, parameters, flops, 3 * flops * train.batch_size * train.steps, 4 * copies * parameters)
