"""Contexts that keep a computation in the precision of its own tensors."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch


def autocast_disabled(device_type: str) -> AbstractContextManager[object]:
    """Turn autocast off. Without effect on devices that have no autocast, such as meta."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


@contextmanager
def reduced_precision_disabled(device: torch.device) -> Iterator[None]:
    """Turn autocast off, and on CUDA also TF32. The caller's settings return at the end."""
    with autocast_disabled(device.type):
        if device.type != "cuda":
            yield
            return
        cudnn: Any = torch.backends.cudnn
        # Since torch 2.9, `fp32_precision` replaces `allow_tf32`.
        attribute, disabled, convolution = (
            ("fp32_precision", "ieee", cudnn.conv) if hasattr(cudnn, "conv") else ("allow_tf32", False, cudnn)
        )
        backends = (torch.backends.cuda.matmul, convolution)
        previous = [getattr(backend, attribute) for backend in backends]
        try:
            for backend in backends:
                setattr(backend, attribute, disabled)
            yield
        finally:
            for backend, value in zip(backends, previous, strict=True):
                setattr(backend, attribute, value)
