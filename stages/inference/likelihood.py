"""Likelihood of codes under the priors, position by position, and the class that explains them best.

Axes: N images, H x W codes of a level, K entries.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from models.precision import reduced_precision_disabled
from stages.inference.trained_models import TrainedModels

Codes = Mapping[str, Tensor]  # level -> (N, H, W) int64, coarse to fine


@torch.inference_mode()
def code_nll(models: TrainedModels, codes: Codes, labels: Tensor | None) -> dict[str, Tensor]:
    """Compute the negative log-likelihood of each code in nats, (N, H, W) per level.

    A code is predicted from the codes before it in raster order, those of the coarser levels, and the label, (N,).
    """
    nats = {}
    for level, prior in models.priors.items():
        with reduced_precision_disabled(prior.positions.device):
            logits = prior(codes[level], {name: codes[name] for name in prior.coarser}, labels)
            nats[level] = F.cross_entropy(logits, codes[level], reduction="none")
    return nats


@torch.inference_mode()
def infer_labels(models: TrainedModels, codes: Codes) -> Tensor | None:
    """Return the most probable label of each image, (N,), given its codes; None for models without classes.

    By Bayes' rule: the frequency of the class in the training images, times the likelihood of the codes of all levels.
    Each class takes one pass through the priors.
    """
    if not models.classes:
        return None
    coarsest = next(iter(codes.values()))
    counts = torch.tensor(models.label_counts, dtype=torch.float64)
    scores = []
    for label, log_frequency in enumerate((counts / counts.sum()).log().tolist()):
        labels = torch.full((len(coarsest),), label, device=coarsest.device)
        nats = sum(grid.double().sum((1, 2)) for grid in code_nll(models, codes, labels).values())
        scores.append(log_frequency - nats)
    return torch.stack(scores).argmax(0)
