"""Activation checkpointing: the same results in less memory."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, multiprocessing, nn

from models.classifier import Classifier
from models.config import ClassifierConfig, LevelConfig, PriorConfig, VQVAEConfig
from models.memory import count_memory
from models.priors import Grid, build, nll
from models.recompute import recompute_activations
from models.vqvae import VQVAE


def prior_loss(name: str, dropout_place: str = "inside", layers: int = 2) -> tuple[nn.Module, Callable[[], Tensor]]:
    config = PriorConfig(
        name, 8, 16, layers, 1, 2, 3, 0.4, 1, 1, label_dropout=0.2, dropout_place=dropout_place
    )  # fmt: skip
    network = build(config, entries=8, grid=(4, 4), coarser={"top": Grid(8, 2, 2)}, classes=3)
    codes, coarser = torch.arange(48).view(3, 4, 4) % 8, {"top": torch.arange(12).view(3, 2, 2) % 8}
    labels = torch.arange(3)
    return network, lambda: nll(network.score(codes, network.condition(coarser), labels), codes).sum()


def vqvae_loss() -> tuple[nn.Module, Callable[[], Tensor]]:
    network = VQVAE(VQVAEConfig({"top": LevelConfig(4, 8, 4, 2, 8, 4)}))
    images = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)
    return network, lambda: network.objective(network(images), images).total


def classifier_loss() -> tuple[nn.Module, Callable[[], Tensor]]:
    network = Classifier(ClassifierConfig(channels=4, halvings=1, dropout=0.5), 3)
    images = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)
    return network, lambda: network(images).square().sum()


NETWORKS = {
    "pixelsnail": partial(prior_loss, "pixelsnail"),
    "pixelcnn": partial(prior_loss, "pixelcnn"),
    "dropout after": partial(prior_loss, "pixelcnn", "after"),
    "vqvae": vqvae_loss,
    "classifier": classifier_loss,
}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_recomputed_activations_change_no_bit(name: str, precision: str):
    """Loss and gradients are equal, with dropout, and the random numbers after them too."""
    results = []
    for recomputes in (False, True):
        torch.manual_seed(0)
        network, loss_of = NETWORKS[name]()
        if recomputes:
            recompute_activations(network)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = loss_of()
        loss.backward()
        results.append([loss.detach(), *(weight.grad for weight in network.parameters()), torch.rand(1)])
    for left, right in zip(*results, strict=True):
        assert left is right is None or torch.equal(left, right)


def compile_and_compare(rank: int) -> None:
    """Compare the loss of a compiled prior with and without recomputed activations."""
    for name in ("pixelsnail", "pixelcnn"):
        losses = []
        for recomputes in (False, True):
            torch.manual_seed(0)
            network, loss_of = prior_loss(name, layers=1)
            if recomputes:
                recompute_activations(network)
            torch.compiler.reset()
            loss = torch.compile(loss_of, backend="aot_eager", fullgraph=True)()
            loss.backward()
            losses.append(loss.detach())
        assert torch.equal(*losses)


@pytest.mark.slow
def test_a_compiled_network_recomputes_its_activations():
    """One graph, without breaks, and the same loss."""
    # In another process, without the shape checks: dynamo cannot trace them.
    multiprocessing.spawn(compile_and_compare, nprocs=1)


@pytest.mark.parametrize("name", ["pixelsnail", "pixelcnn"])
def test_recomputed_activations_need_less_memory(name: str):
    """Only the inputs of blocks are kept between the passes."""
    peaks = []
    for recomputes in (False, True):
        with count_memory() as counter:
            network, loss_of = prior_loss(name, layers=4)
            if recomputes:
                recompute_activations(network)
            for weight in network.parameters():
                weight.grad = torch.zeros_like(weight)
            fixed = counter.current_bytes
            loss_of().backward()
        peaks.append(counter.peak_bytes - fixed)
    assert peaks[1] < 0.6 * peaks[0]


def test_an_evaluated_network_recomputes_nothing():
    """There is no backward pass to save memory for."""
    network, loss_of = prior_loss("pixelcnn")
    recompute_activations(network)
    calls = []
    for block in network.blocks:
        block.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    network.eval()
    loss_of().backward()
    assert calls == [True, True]
    with torch.no_grad():
        network.train()
        loss_of()
    assert calls == [True, True, False, False]
