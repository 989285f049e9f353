"""What a network costs before it runs: parameters and floating-point operations.

Both are exact on the meta device, where nothing is allocated or computed:

    with torch.device("meta"):
        vqvae, image = VQVAE(config), torch.empty(1, 3, 256, 256)
    forward_flops(lambda: vqvae(image))
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.quantizer import Quantizer


def parameters(module: nn.Module) -> int:
    """Count the numbers a module learns, codebooks included whichever way they learn."""
    learnt = {id(each): each.numel() for each in module.parameters()}
    for part in module.modules():
        if isinstance(part, Quantizer) and part.config.mode != "none":
            learnt[id(part.codebook)] = part.codebook.numel()
    return sum(learnt.values())


def forward_flops(call: Callable[[], object]) -> int:
    """Count the operations of a call's matrix products, convolutions and attention; training takes thrice these."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()
