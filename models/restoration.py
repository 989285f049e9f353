"""Restoration of codes: the codes that a prior finds unlikely are drawn again, in raster order.

B grids, H x W positions, K codebook entries.
Source: Naval Marimont and Tarroni 2021, "Anomaly detection through latent space restoration using vector-quantized
variational autoencoders".
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor

from models.precision import reduced_precision_disabled
from models.priors import Prior
from models.priors.cached import CachedPrior
from models.sampling import GumbelNoise, SamplingRule


def restore(
    prior: Prior,
    codes: Int64[Tensor, "B H W"],
    *,
    threshold: float,
    seed: int,
    sample_ids: Int64[Tensor, " B"],
    coarser: Mapping[str, Int64[Tensor, "B _ _"]] | None = None,
    labels: Int64[Tensor, " B"] | None = None,
    rule: SamplingRule | None = None,
) -> Int64[Tensor, "B H W"]:
    """Draw each code again whose negative log-likelihood exceeds `threshold`, in nats; copy the others.

    The likelihood is that given the codes restored so far, so a code can become likely, or unlikely, by a restored
    earlier one. A threshold of infinity copies all codes. One below 0 draws all of them, as `models.sampling.draw` does
    with the same seed and sample IDs. Raises ValueError for inputs that do not fit the prior. The prior is in
    evaluation mode.
    """
    rule = rule or SamplingRule()
    prior.check(codes, coarser, labels)
    device = prior.positions.device
    restored = codes.clone()
    noise = GumbelNoise(seed, sample_ids.to(device), prior)
    with torch.inference_mode(), reduced_precision_disabled(device):
        cache = CachedPrior(prior, batch=len(codes))
        cache.reset(coarser, labels)
        for row in range(prior.height):
            cache.start_row(row)
            row_noise = noise.row(row)
            for column in range(prior.width):
                logits, current = cache.step(column), restored[:, row, column]
                nats = F.cross_entropy(logits, current, reduction="none")
                chosen = torch.where(nats > threshold, rule(logits, row_noise[:, column]), current)
                restored[:, row, column] = chosen
                cache.append(chosen, column)
    return restored
