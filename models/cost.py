"""Cost of a network: number of parameters and floating-point operations.

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


def count_parameters(module: nn.Module) -> int:
    """Count learned parameters, including codebook buffers."""
    sizes = {id(parameter): parameter.numel() for parameter in module.parameters()}
    for submodule in module.modules():
        if isinstance(submodule, Quantizer) and submodule.config.mode != "none":
            sizes[id(submodule.codebook)] = submodule.codebook.numel()
    return sum(sizes.values())


def count_frozen(module: nn.Module) -> int:
    """Count the parameters that no training changes: they have no gradients and no moments."""
    return sum(parameter.numel() for parameter in module.parameters() if not parameter.requires_grad)


def forward_flops(call: Callable[[], object]) -> int:
    """Count the operations of a call's matrix products, convolutions and attention."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()
