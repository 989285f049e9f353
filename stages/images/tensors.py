"""Pixels on their way into a network."""

import torch
from torch import Tensor


def to_float(images: Tensor, device: torch.device | str) -> Tensor:
    """Turn a (B, H, W, 3) batch of bytes into (B, 3, H, W) floats in [-1, 1] on a device."""
    return images.to(device, non_blocking=True).permute(0, 3, 1, 2).float() / 127.5 - 1
