"""Activation checkpointing: blocks that recompute their activations in the backward pass instead of storing them.

Only a block's inputs stay in memory between the passes. Outputs and gradients have the same bits as without it, even
with dropout. A step takes about a third longer.
Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".
"""

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class RecomputableBlock(nn.Module):
    """Block that recomputes its activations in the backward pass of training, if `recomputes` is set."""

    recomputes = False

    def __call__(self, *inputs: Any) -> Any:
        if self.recomputes and self.training and torch.is_grad_enabled():
            return checkpoint(super().__call__, *inputs, use_reentrant=False)
        return super().__call__(*inputs)


def recompute_activations(network: nn.Module) -> None:
    """Set `recomputes` on every RecomputableBlock of a network."""
    for module in network.modules():
        if isinstance(module, RecomputableBlock):
            module.recomputes = True
