"""Prior over continuous latents: a density that integrates to one, causal, and samples that follow it."""

import math

import pytest
import torch

from models.config import PriorConfig
from models.priors.density import DensityPrior, Mixture

GRID = (3, 4)


def density_prior(name: str = "pixelsnail") -> DensityPrior:
    """Build a small prior of two numbers per vector, conditioned on a coarser level of three for PixelCNN."""
    torch.manual_seed(0)
    attention_layers = 1 if name == "pixelsnail" else 0
    config = PriorConfig(name, 8, 8, 2, attention_layers, 2, 3, 0.0, 1, 1)
    if name == "pixelsnail":
        return DensityPrior(config, dim=2, grid=GRID, coarser={}, components=3).eval()
    return DensityPrior(config, dim=2, grid=(4, 4), coarser={"top": (3, (2, 2))}, components=3).eval()


def test_density_of_a_mixture_integrates_to_one():
    """Summed over a fine grid of one number, for two components."""
    mixture = Mixture(torch.tensor([0.3, 0.7]).log(), torch.tensor([[-1.0], [2.0]]), torch.tensor([[0.0], [-1.0]]))
    values = torch.linspace(-8, 8, 4001)[:, None]
    repeated = Mixture(*(part.expand(4001, *part.shape) for part in mixture))
    assert float(repeated.log_prob(values).exp().sum()) * 16 / 4000 == pytest.approx(1, abs=1e-4)


def test_samples_of_a_mixture_have_its_moments():
    """Mean and deviation of 20,000 draws of two components."""
    mixture = Mixture(
        torch.tensor([0.25, 0.75]).log().expand(20_000, 2),
        torch.tensor([[-2.0], [2.0]]).expand(20_000, 2, 1),
        torch.full((20_000, 2, 1), math.log(0.5)),
    )
    draws = mixture.sample(torch.Generator().manual_seed(0))
    assert float(draws.mean()) == pytest.approx(1, abs=0.05)
    assert float(draws.var()) == pytest.approx(3 + 0.25, abs=0.1)


@pytest.mark.parametrize("name", ["pixelsnail", "pixelcnn"])
def test_mixture_of_a_position_depends_on_earlier_latents_only(name: str):
    """A changed latent changes no mixture at or before its position, and some after it."""
    prior = density_prior(name)
    height, width = prior.grid
    coarser = {"top": torch.randn(1, 2, 2, 3)} if name == "pixelcnn" else None
    latents = torch.randn(1, height, width, 2)
    changed = latents.clone()
    changed[:, 1, 2] += 1
    before, after = (prior(batch, coarser).means.flatten(1, 2) for batch in (latents, changed))
    differs = (before != after).flatten(2).any(-1)[0]
    assert not differs[: width + 3].any() and differs[width + 3 :].any()


def test_nll_falls_in_training():
    """A few steps on latents of one value fit them: the density is high there."""
    prior = density_prior()
    latents = torch.ones(4, *GRID, 2)
    optimizer = torch.optim.Adam(prior.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = prior.nll(latents).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 10


def test_draws_depend_on_the_seed_and_the_coarser_latents():
    """Equal seeds give equal grids; another seed and other coarser latents give others."""
    prior = density_prior("pixelcnn")
    coarser = {"top": torch.randn(2, 2, 2, 3)}
    first = prior.draw(2, seed=0, coarser=coarser)
    assert first.shape == (2, 4, 4, 2) and torch.equal(first, prior.draw(2, seed=0, coarser=coarser))
    assert not torch.equal(first, prior.draw(2, seed=1, coarser=coarser))
    assert not torch.equal(first, prior.draw(2, seed=0, coarser={"top": coarser["top"] + 3}))
