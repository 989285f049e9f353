"""Optimizer, its learning-rate schedule, and the tensors of its state that a checkpoint must have."""

import math

import torch
from torch import nn

from stages.config import TrainConfig


def build_optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Build Adam over all parameters of a network."""
    return torch.optim.Adam(network.parameters(), lr=config.learning_rate)


def state_shapes(weight: nn.Parameter) -> dict[str, torch.Size]:
    """Return the names and shapes of Adam's state of a trained parameter."""
    return {"step": torch.Size(), "exp_avg": weight.shape, "exp_avg_sq": weight.shape}


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the learning rate of a step: linear warm-up, then constant or half a cosine.

    Warm-up starts at learning_rate / warmup_steps. The cosine would reach 0 at the step after the last.
    """
    peak = config.learning_rate
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return peak
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return peak * (0.5 * (1 + math.cos(math.pi * progress)))
