"""Memory of one GPU in training: weights, gradients, optimizer and activations, counted on fake tensors.

Activations are counted at the peak of a forward and backward pass, with the temporary tensors of operations. Each image
of a micro-batch adds the same number of bytes, so counts for one and two images give that for any number. HEADROOM is
left for what CUDA and its allocator add.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import cost
from models.config import ClassifierConfig, PriorConfig
from models.memory import MemoryCounter, count_memory
from models.priors import Grid, build, nll
from models.quantizer import BatchSlice
from models.recompute import recompute_activations
from models.vqvae import VQVAE
from stages.cluster_config import ClusterConfig
from stages.config import Params, TrainConfig
from stages.formats.model_file import build_classifier
from stages.training.gradient_accumulation import autocast

GB = 1e9
HEADROOM = 0.1  # fraction of a GPU's memory for CUDA's context, kernels' workspaces and fragments: an assumption
CARDS_GB = (24, 40, 80)
FLOAT_BYTES = 4

# Number of images -> network, and a function that computes the loss of so many images.
LossBuilder = Callable[[int], tuple[nn.Module, Callable[[], Tensor]]]


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one GPU that trains a network, and the images that it processes."""

    stage: str
    weights: int  # parameters and buffers, which include the codebooks
    gradients: int  # of weights that are not frozen; with DDP's communication buckets, if there are several workers
    optimizer: int  # Adam's two moments of them; an upper bound for Muon, which has one for each hidden matrix
    ema: int  # averaged weights
    first_image: int  # activations of a micro-batch of one image
    next_image: int  # activations of each further image
    share: int  # images of the global batch per worker
    microbatch: int  # images per forward and backward pass; the share if the setting is null or auto

    @property
    def state(self) -> int:
        """Bytes that do not depend on the micro-batch."""
        return self.weights + self.gradients + self.optimizer + self.ema

    def activations(self, images: int) -> int:
        """Return the bytes of the activations of a micro-batch."""
        return self.first_image + (images - 1) * self.next_image

    def total(self, images: int) -> int:
        """Return the bytes of training with micro-batches of this many images."""
        return self.state + self.activations(images)

    def largest_microbatch(self, card_bytes: float) -> int:
        """Return the largest micro-batch that fits into a GPU, at most the share; 0 if one image does not fit."""
        room = card_bytes * (1 - HEADROOM) - self.total(1)
        return min(self.share, 1 + math.floor(room / max(self.next_image, 1))) if room >= 0 else 0

    def to_json(self) -> dict[str, object]:
        """Return the bytes by purpose and in total, and the largest micro-batch for each size of GPU."""
        largest = {f"{card}_gb": self.largest_microbatch(card * GB) for card in CARDS_GB}
        activations, total = self.activations(self.microbatch), self.total(self.microbatch)
        return asdict(self) | {"activations": activations, "total": total, "largest_microbatch": largest}


def count_all(settings: Params, classes: int) -> Iterator[TrainingMemory]:
    """Count the VQ-VAE, each prior and each classifier. `classes` is the number of classes, 0 without labels."""
    size, cluster = settings.dataset.image_size, settings.cluster

    def vqvae(images: int) -> tuple[nn.Module, Callable[[], Tensor]]:
        network, batch = VQVAE(settings.vqvae), torch.zeros(images, 3, size, size)
        return network, lambda: network.objective(network(batch, BatchSlice(0, 0, 0, images)), batch).total

    yield count("vqvae", vqvae, settings.train_vqvae, cluster.for_stage("vqvae"))
    coarser: dict[str, Grid] = {}
    for level, side in settings.vqvae.grids(size).items():
        prior, grid = settings.priors[level], Grid(settings.vqvae.levels[level].entries, side, side)
        builder = _prior_builder(prior.network, grid, dict(coarser), classes)
        stage = f"prior_{level}"
        yield count(stage, builder, prior.train, cluster.for_stage(stage))
        coarser[level] = grid
    for name, classifier in settings.classifiers.items():
        stage, builder = f"classifier_{name}", _classifier_builder(classifier.network, size, classes)
        yield count(stage, builder, classifier.train, cluster.for_stage(stage))


def count(stage: str, build_loss: LossBuilder, config: TrainConfig, cluster: ClusterConfig) -> TrainingMemory:
    """Count the memory of one training, of a range of workers with the fewest: they have the largest shares."""
    weights, trained, first_image = _count_step(build_loss, config, 1)
    *_, first_two = _count_step(build_loss, config, 2)
    share = math.ceil(config.batch_size / cluster.min_workers)
    return TrainingMemory(
        stage,
        weights,
        gradients=trained * (2 if cluster.max_workers > 1 else 1),
        optimizer=2 * trained,
        ema=weights if config.ema_decay else 0,
        first_image=first_image,
        next_image=max(0, first_two - first_image),
        share=share,
        microbatch=min(config.microbatch, share) if isinstance(config.microbatch, int) else share,
    )


def _count_step(build_loss: LossBuilder, config: TrainConfig, images: int) -> tuple[int, int, int]:
    """Return the bytes of all weights, of those that are not frozen, and of activations at the peak of a step."""
    with count_memory() as counter:
        network, compute_loss = build_loss(images)
        if config.recompute_activations:
            recompute_activations(network)
        for weight in network.parameters():
            if weight.requires_grad:
                weight.grad = torch.zeros_like(weight)  # as in each pass of a step after the first one
        weights = FLOAT_BYTES * sum(tensor.numel() for tensor in network.state_dict().values())
        fixed = _reset_peak(counter)
        with autocast(config, torch.device("cpu")):
            loss = compute_loss()
        loss.backward()
        trained = weights - FLOAT_BYTES * cost.count_frozen(network)
    return weights, trained, counter.peak_bytes - fixed


def _reset_peak(counter: MemoryCounter) -> int:
    """Set the peak to the bytes in use; return them."""
    counter.peak_bytes = counter.current_bytes
    return counter.current_bytes


def _prior_builder(config: PriorConfig, grid: Grid, coarser: Mapping[str, Grid], classes: int) -> LossBuilder:
    def build_loss(images: int) -> tuple[nn.Module, Callable[[], Tensor]]:
        network = build(config, entries=grid.entries, grid=(grid.height, grid.width), coarser=coarser, classes=classes)
        codes = torch.zeros(images, grid.height, grid.width, dtype=torch.int64)
        condition = {
            name: torch.zeros(images, coarse.height, coarse.width, dtype=torch.int64)
            for name, coarse in coarser.items()
        }
        labels = torch.zeros(images, dtype=torch.int64) if classes else None
        # Not `forward`, which checks the values of codes: fake tensors have none.
        return network, lambda: nll(network.score(codes, network.condition(condition), labels), codes).sum()

    return build_loss


def _classifier_builder(config: ClassifierConfig, size: int, classes: int) -> LossBuilder:
    def build_loss(images: int) -> tuple[nn.Module, Callable[[], Tensor]]:
        network = build_classifier(config, max(classes, 1))  # a layer without outputs cannot be initialized
        batch = torch.zeros(images, 3, size, size)
        labels = torch.zeros(images, dtype=torch.int64)
        return network, lambda: F.cross_entropy(network(batch).float(), labels)

    return build_loss


def lines(memories: Iterable[TrainingMemory], width: int) -> Iterator[str]:
    """Format the memory of trainings as a table, whose first column has `width` characters."""
    cards = "".join(f"{f'{card} GB':>8}" for card in CARDS_GB)
    yield "GB per GPU, counted; the last columns are the largest micro-batch that fits a GPU with so much memory:"
    yield (
        f"{'stage':<{width}}{'weights':>8}{'gradients':>10}{'optimizer':>10}{'EMA':>6}{'activations':>12}{'total':>7}"
        f"{'images':>8}{cards}"
    )
    for memory in memories:
        bytes_of_columns = (memory.weights, memory.gradients, memory.optimizer, memory.ema)
        columns = "".join(
            f"{value / GB:>{digits}.1f}" for value, digits in zip(bytes_of_columns, (8, 10, 10, 6), strict=True)
        )
        fits = "".join(f"{memory.largest_microbatch(card * GB) or 'none':>8}" for card in CARDS_GB)
        yield (
            f"{memory.stage:<{width}}{columns}{memory.activations(memory.microbatch) / GB:>12.1f}"
            f"{memory.total(memory.microbatch) / GB:>7.1f}{memory.microbatch:>8}{fits}"
        )
