"""Conversions between image bytes and network tensors.

Axes: N or B images, H rows, W columns, 3 RGB channels. Channels come last in bytes, as in image files, and second in
tensors.
"""

import numpy as np
import torch
from torch import Tensor


def to_float(images: Tensor, device: torch.device | str) -> Tensor:
    """Convert uint8 images, (B, H, W, 3), to floats in [-1, 1], (B, 3, H, W), on a device."""
    return images.to(device, non_blocking=True).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Convert floats in [-1, 1], (N, 3, H, W), to uint8 images, (N, H, W, 3): clip, then round."""
    return np.rint((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)
