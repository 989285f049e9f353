"""Optimizers: updates equal torch's own, every parameter has one optimizer, and runs resume bit-identical."""

import dataclasses
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.config import PriorConfig
from models.priors import Grid, build
from stages.config import TrainConfig
from stages.training import muon
from stages.training.checkpoint_state import TrainableModel
from stages.training.muon import Muon, orthogonalize
from stages.training.optimizer import build_optimizers, learning_rate

ADAM = TrainConfig(steps=20, batch_size=4, learning_rate=0.01, ema_decay=0.9)
CONFIGS = {
    "adam": ADAM,
    "adamw": dataclasses.replace(ADAM, optimizer="adamw", weight_decay=0.1),
    "muon": dataclasses.replace(ADAM, optimizer="muon", weight_decay=0.1),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ELU(), nn.Flatten(), nn.Linear(16, 5, bias=False))


def compute_gradients(module: nn.Module, step: int) -> None:
    images = torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(step))
    module.zero_grad()
    F.cross_entropy(module(images), images.flatten(1).argmax(1) % 5).backward()


def train(model: TrainableModel, steps: range) -> None:
    for step in steps:
        compute_gradients(model.network, step)
        model.apply_gradients(0.01, max_grad_norm=1.0)
        model.update_ema()


@pytest.mark.parametrize(("name", "reference"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_updates_equal_those_of_torch(name: str, reference: type[torch.optim.Optimizer]):
    """Fused kernels and torch's plain loop differ by rounding only."""
    ours, theirs = network(), network()
    decay = {"weight_decay": CONFIGS[name].weight_decay}
    [optimizer], plain = build_optimizers(ours, CONFIGS[name]), reference(theirs.parameters(), lr=0.01, **decay)
    for step in range(5):
        for module, updater in ((ours, optimizer), (theirs, plain)):
            compute_gradients(module, step)
            updater.step()
    for weight, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(weight, expected)


@pytest.mark.parametrize("shape", [(4, 4), (3, 8), (8, 3)])
def test_muon_updates_equal_those_of_torch(shape: tuple[int, int]):
    """torch iterates in bfloat16, which has 8 bits of precision."""
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), torch.randn(5, *shape)
    weights = [nn.Parameter(start.clone()) for _ in range(2)]
    optimizers = [
        Muon(weights[:1], lr=0.05, weight_decay=0.02, scale=0.2),
        torch.optim.Muon(weights[1:], lr=0.05, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
    ]
    for gradient in gradients:
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
    ours, theirs = (weight.detach() - start for weight in weights)
    assert (ours - theirs).norm() < 0.03 * theirs.norm()


def test_muon_updates_a_convolution_as_a_matrix():
    """All numbers of an output are one row, and weights of one shape are independent of each other."""
    torch.manual_seed(0)
    shapes = [(4, 2, 3, 3), (4, 18), (4, 18)]
    weights = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    gradient, other = torch.randn(4, 18), torch.randn(4, 18)
    for weight, values in zip(weights, (gradient, other, gradient), strict=True):
        weight.grad = values.view(weight.shape).clone()
    Muon(weights, lr=0.01).step()
    torch.testing.assert_close(weights[0].flatten(1), weights[2])
    assert not torch.allclose(weights[1], weights[2])


def test_muon_orthogonalizes_few_matrices_at_once(monkeypatch: pytest.MonkeyPatch):
    """So that it needs little memory beside the weights; the updates are the same."""

    def updated(max_numbers: int) -> list[torch.Tensor]:
        monkeypatch.setattr(muon, "MAX_NUMBERS", max_numbers)
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.zeros(4, 6)) for _ in range(5)]
        for weight in weights:
            weight.grad = torch.randn(4, 6)
        Muon(weights, lr=0.01).step()
        return [weight.detach() for weight in weights]

    sizes: list[int] = []

    def record(matrices: torch.Tensor) -> torch.Tensor:
        sizes.append(len(matrices))
        return orthogonalize(matrices)

    monkeypatch.setattr(muon, "orthogonalize", record)
    for left, right, small in zip(updated(2**24), updated(50), updated(1), strict=True):
        torch.testing.assert_close(left, right)
        torch.testing.assert_close(left, small)
    assert sizes == [5, 2, 2, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_orthogonalized_matrices_have_singular_values_near_1(shape: tuple[int, int]):
    """At any scale; a matrix of zeros stays zero."""
    torch.manual_seed(0)
    matrices = torch.cat([torch.randn(5, *shape) * torch.tensor([1e-6, 0.1, 1, 10, 1e6])[:, None, None]])
    values = torch.linalg.svdvals(orthogonalize(matrices))
    assert values.min() > 0.3 and values.max() < 1.3
    assert not orthogonalize(torch.zeros(1, *shape)).any()


def test_muon_has_the_hidden_matrices_and_adamw_the_rest():
    """Embeddings, biases and the layer of the logits are AdamW's, and no parameter is left out."""
    config = PriorConfig("pixelcnn", channels=8, residual_channels=8, layers=2, attention_layers=1, output_layers=1)
    prior = build(config, entries=5, grid=(4, 4), coarser={"top": Grid(3, 2, 2)}, classes=2)
    muon, adamw = (
        {id(weight) for group in optimizer.param_groups for weight in group["params"]}
        for optimizer in build_optimizers(prior, CONFIGS["muon"])
    )
    names = {id(weight): name for name, weight in prior.named_parameters()}
    assert not muon & adamw and muon | adamw == names.keys()
    tables = ("embedding", "label", "head", "conditioning.embeddings")
    for weight, name in names.items():
        assert (weight in adamw) == (name.endswith("bias") or any(table in name for table in tables)), name


@pytest.mark.parametrize("name", CONFIGS)
def test_state_of_every_optimizer_resumes_bit_identical(name: str):
    """A new model that restores the tensors of a checkpoint ends with the tensors of an unbroken run."""
    unbroken, first, second = (TrainableModel(network(), CONFIGS[name]) for _ in range(3))
    train(unbroken, range(9))
    train(first, range(4))
    saved = {key: tensor.clone() for key, tensor in first.tensors().items()}
    assert not second.mismatch({**saved, "metrics_since_log": torch.zeros(1, 2)}, num_metrics=2)
    second.restore(saved)
    train(second, range(4, 9))
    tensors = second.tensors()
    assert tensors.keys() == unbroken.tensors().keys()
    assert all(torch.equal(tensors[key], tensor) for key, tensor in unbroken.tensors().items())


@pytest.mark.parametrize("name", CONFIGS)
def test_state_without_a_moment_is_refused(name: str):
    """Each tensor of each optimizer is needed."""
    model = TrainableModel(network(), CONFIGS[name])
    train(model, range(1))
    tensors = {**model.tensors(), "metrics_since_log": torch.zeros(1, 2)}
    moments = [key for key in tensors if key.startswith("optimizer.")]
    assert len({key.split(".")[1] for key in moments}) == len(list(model.network.parameters()))
    for moment in moments:
        rest = {key: tensor for key, tensor in tensors.items() if key != moment}
        assert model.mismatch(rest, num_metrics=2).startswith(moment)


def test_weight_decay_with_adam_is_refused():
    """Adam of the paper has none, and would ignore the setting."""
    with pytest.raises(ValueError, match=r"weight_decay must be 0 with optimizer adam, got 0\.1"):
        dataclasses.replace(ADAM, weight_decay=0.1)


def test_scale_without_muon_is_refused():
    """No other optimizer has this scale."""
    with pytest.raises(ValueError, match=r"muon_scale must be 1 with optimizer adam, got 0\.3"):
        dataclasses.replace(ADAM, muon_scale=0.3)
    with pytest.raises(ValueError, match=r"muon_scale must be above 0, such as 0\.3, got 0"):
        dataclasses.replace(ADAM, optimizer="muon", muon_scale=0.0)


def test_the_learning_rate_rises_then_falls_almost_to_zero():
    """Linear warm-up, then half a cosine."""
    config = TrainConfig(steps=20, batch_size=4, lr_schedule="cosine", warmup_steps=3)
    rates = [learning_rate(config, step) for step in range(20)]
    assert rates[:3] == pytest.approx([1e-4, 2e-4, 3e-4])
    assert all(later < earlier for earlier, later in pairwise(rates[3:]))
    assert rates[-1] < 0.02 * config.learning_rate
