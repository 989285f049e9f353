"""Prior over continuous latents, for a VQ-VAE that does not quantize: the network of a prior with a density as output.

p(latents | coarser latents, label) = product over positions of a mixture of M Gaussians with diagonal covariances.
B grids, H x W positions, D numbers per latent vector, M components.
The paper's authors state that the model does not work without quantization (author response, lines 45-46). This prior
tests it with the networks of the quantized model. It is no stage of the pipeline: see benchmarks/continuous.py.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from models.config import PriorConfig
from models.priors import build
from models.priors.conditioning import Grid

COMPONENTS = 8
MIN_LOG_SCALE = -7.0  # a component of no width would have an infinite density at one point


class Mixture(NamedTuple):
    """Mixtures of Gaussians of any number of positions."""

    log_weights: Float[Tensor, "*positions M"]
    means: Float[Tensor, "*positions M D"]
    log_scales: Float[Tensor, "*positions M D"]

    def log_prob(self, latents: Float[Tensor, "*positions D"]) -> Float[Tensor, "*positions"]:
        """Compute the logarithm of the density, in nats."""
        errors = (latents.unsqueeze(-2) - self.means) * (-self.log_scales).exp()
        by_component = -0.5 * (errors.square() + math.log(2 * math.pi)) - self.log_scales
        return torch.logsumexp(self.log_weights + by_component.sum(-1), -1)

    def sample(self, generator: torch.Generator) -> Float[Tensor, "*positions D"]:
        """Draw one vector per position: first a component, then each number."""
        uniform = torch.rand(self.log_weights.shape, generator=generator).clamp(min=torch.finfo(torch.float32).tiny)
        component = (self.log_weights - (-uniform.log()).log()).argmax(-1)  # Gumbel-max
        index = component[..., None, None].expand(*component.shape, 1, self.means.shape[-1])
        mean, log_scale = (values.gather(-2, index).squeeze(-2) for values in (self.means, self.log_scales))
        return mean + log_scale.exp() * torch.randn(mean.shape, generator=generator)


class DensityPrior(nn.Module):
    """Autoregressive density of one level's latents, given the earlier ones, the coarser levels and the label.

    Embeddings of codes are linear layers over latents here; everything else is the network of `Prior`. The latents
    should have a mean near 0 and a deviation near 1.
    """

    def __init__(
        self,
        config: PriorConfig,
        *,
        dim: int,
        grid: tuple[int, int],
        coarser: Mapping[str, tuple[int, tuple[int, int]]],
        classes: int = 0,
        components: int = COMPONENTS,
    ) -> None:
        """`coarser` maps a level to its numbers per vector and its grid, coarse to fine."""
        super().__init__()
        self.dim, self.components, self.grid = dim, components, grid
        outputs = components * (1 + 2 * dim)
        grids = {name: Grid(1, *coarser_grid) for name, (_, coarser_grid) in coarser.items()}
        self.network = build(config, entries=outputs, grid=grid, coarser=grids, classes=classes)
        self.network.embedding = nn.Linear(dim, config.channels)  # type: ignore[assignment]
        if self.network.conditioning is not None:
            for name, (coarser_dim, _) in coarser.items():
                self.network.conditioning.embeddings[f"level_{name}"] = nn.Linear(coarser_dim, config.channels)
        with torch.no_grad():
            # Components start at different places: equal ones would stay equal.
            self._split(self.network.head.bias)[1].normal_(std=0.5)

    def forward(
        self,
        latents: Float[Tensor, "B H W D"],
        coarser: Mapping[str, Float[Tensor, "B _ _ _"]] | None = None,
        labels: Int64[Tensor, " B"] | None = None,
    ) -> Mixture:
        """Compute the mixture of every position from the earlier latents in raster order.

        `latents` may lack the last rows of grids.
        """
        condition = self.network.condition(coarser)
        if condition is not None:
            condition = condition[:, : latents.shape[1]]
        outputs = self.network.score(latents, condition, labels).permute(0, 2, 3, 1)
        log_weights, means, log_scales = self._split(outputs.float())
        return Mixture(log_weights.log_softmax(-1), means, log_scales.clamp(min=MIN_LOG_SCALE))

    def nll(
        self,
        latents: Float[Tensor, "B H W D"],
        coarser: Mapping[str, Float[Tensor, "B _ _ _"]] | None = None,
        labels: Int64[Tensor, " B"] | None = None,
    ) -> Float[Tensor, " B"]:
        """Compute the negative log-density of each grid, summed over positions, in nats. It may be below 0."""
        return -self(latents, coarser, labels).log_prob(latents).flatten(1).sum(1)

    @torch.inference_mode()
    def draw(
        self,
        count: int,
        *,
        seed: int,
        coarser: Mapping[str, Float[Tensor, "B _ _ _"]] | None = None,
        labels: Int64[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B H W D"]:
        """Draw grids by ancestral sampling, each position after all earlier ones. Evaluation mode is the caller's."""
        generator = torch.Generator().manual_seed(seed)
        height, width = self.grid
        latents = torch.zeros(count, height, width, self.dim)
        for row in range(height):
            for column in range(width):
                mixture = self(latents[:, : row + 1], coarser, labels)
                position = Mixture(*(values[:, row, column] for values in mixture))
                latents[:, row, column] = position.sample(generator)
        return latents

    def _split(self, outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split outputs into log-weights (..., M), means and log-scales (..., M, D)."""
        count = self.components * self.dim
        log_weights, means, log_scales = outputs.split([self.components, count, count], -1)
        return log_weights, means.unflatten(-1, (-1, self.dim)), log_scales.unflatten(-1, (-1, self.dim))
