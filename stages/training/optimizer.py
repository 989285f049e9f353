"""Optimizers, their learning-rate schedule, and the tensors of their state that a checkpoint must have.

To add an optimizer, build it in `build_optimizers`, name its tensors in `state_shapes`, and add it to
`TrainConfig.optimizer` in stages/config.py. pipeline/training_memory.py counts two tensors per weight for each.
"""

import math
from collections.abc import Iterator

import torch
from torch import nn

from stages.config import TrainConfig
from stages.training.muon import Muon

OUTPUT_LAYERS = ("head", "logits")  # names of the layers that compute logits


def build_optimizers(network: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Build the optimizers of a network, which together have all of its parameters.

    Muon updates the matrices of all layers but those that compute logits. AdamW updates embeddings, biases and the
    layer of the logits, as Muon's authors advise. Of a VQ-VAE, Muon thus has every convolution.
    """
    # A fused kernel makes one pass over each parameter instead of ten. Not on CPUs: its CPU version ignores strides,
    # and a gradient or a restored state may have another memory format than its parameter.
    fused = all(weight.is_cuda for weight in network.parameters())
    if config.optimizer == "adam":
        return [torch.optim.Adam(network.parameters(), lr=config.learning_rate, fused=fused)]
    decay = config.weight_decay
    matrices = list(hidden_matrices(network)) if config.optimizer == "muon" else []
    chosen = set(matrices)
    others = [weight for weight in network.parameters() if weight not in chosen]
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(Muon(matrices, lr=config.learning_rate, weight_decay=decay, scale=config.muon_scale))
    if others:
        optimizers.append(torch.optim.AdamW(others, lr=config.learning_rate, weight_decay=decay, fused=fused))
    return optimizers


def hidden_matrices(network: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the weights of linear layers and convolutions, except those that compute logits."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Embedding) or name.rpartition(".")[2] in OUTPUT_LAYERS:
            continue
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim >= 2:
            yield weight


def state_shapes(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> dict[str, torch.Size]:
    """Return the name and shape of each tensor that an optimizer has as its state of a trained parameter."""
    if isinstance(optimizer, Muon):
        return {"momentum_buffer": weight.shape}
    return {"step": torch.Size(), "exp_avg": weight.shape, "exp_avg_sq": weight.shape}


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the learning rate of a step: linear warm-up, then constant or cosine decay.

    Warm-up starts at learning_rate / warmup_steps. The cosine would reach 0 at the step after the last.
    """
    peak = config.learning_rate
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return peak
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return peak * (0.5 * (1 + math.cos(math.pi * progress)))
