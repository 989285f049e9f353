"""Images of a caller, as a trained VQ-VAE reads them, and its images as a caller wants them.

Axes: N images, H rows, W columns, 3 RGB channels. Channels come last in bytes and second in tensors.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stages.config import DatasetConfig
from stages.errors import UserError
from stages.images.decode import RejectedImage, convert, decode
from stages.images.sources import MAX_FILE_BYTES
from stages.images.tensors import to_float, to_uint8

ImageFormat: TypeAlias = Literal["pil", "numpy", "torch"]
OneImage: TypeAlias = "str | Path | Image.Image | np.ndarray"
Images: TypeAlias = "OneImage | Tensor | Sequence[OneImage]"


def image_settings(meta: Mapping[str, Any]) -> DatasetConfig:
    """Return the settings by which a VQ-VAE's images were converted, from the metadata of its artifact."""
    return dataclasses.replace(DatasetConfig("images", ".", meta["image_size"]), **meta["images"])


def read_file(path: Path, settings: DatasetConfig) -> np.ndarray:
    """Read an image file as (H, W, 3) bytes. Raises UserError if it cannot be read."""
    fix = "Choose another file: docs/data.md lists the supported formats."
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise RejectedImage(f"longer than {MAX_FILE_BYTES >> 20} MiB")
        return np.array(decode(path.read_bytes(), settings).pixels)
    except FileNotFoundError:
        raise UserError(f"{path.name} does not exist.", where=path, fix="Correct the path.", code=4) from None
    except IsADirectoryError:
        raise UserError(
            f"{path.name} is a folder.", where=path, fix=f"Name the images in it, such as {path}/*.jpg", code=4
        ) from None
    except OSError as error:
        reason, fix = error.strerror or str(error), "Choose an image file that can be read."
    except RejectedImage as error:
        reason = str(error)
    raise UserError(f"{path.name} is not a valid image: {reason}.", where=path, fix=fix, code=4)


def to_pixels(images: Images, settings: DatasetConfig) -> np.ndarray:
    """Convert one image or several to uint8, (N, H, W, 3), of the size that the VQ-VAE reads.

    An image is a path, a PIL image or a uint8 array, (H, W, 3). Several are a sequence of these, a uint8 array,
    (N, H, W, 3), or a tensor of floats in [-1, 1], (N, 3, H, W). Raises UserError for a file that cannot be read and
    ValueError for anything else that is no image.
    """
    if isinstance(images, Tensor):
        images = _from_tensor(images)
    if isinstance(images, str | Path | Image.Image) or (isinstance(images, np.ndarray) and images.ndim == 3):
        images = [images]
    pixels = [_to_pixels(image, f"image {index}", settings) for index, image in enumerate(images)]
    if not pixels:
        raise ValueError("images must be 1 or more, got none")
    return np.stack(pixels)


def _to_pixels(image: OneImage, name: str, settings: DatasetConfig) -> np.ndarray:
    if isinstance(image, str | Path):
        return read_file(Path(image), settings)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(f"{name} must be uint8 of shape (H, W, 3), got {image.dtype} of shape {image.shape}")
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise ValueError(f"{name} must be a path, a PIL image or a uint8 array, got {type(image).__name__}")
    try:
        return convert(image, settings)
    except RejectedImage as error:
        raise ValueError(f"{name} must be a valid image: {error}") from None


def _from_tensor(images: Tensor) -> np.ndarray:
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            "a tensor of images must be floats in [-1, 1] of shape (N, 3, H, W), "
            f"got {images.dtype} of shape {tuple(images.shape)}"
        )
    return to_uint8(images.detach().float().cpu().numpy())


def from_pixels(pixels: np.ndarray, image_format: ImageFormat, device: torch.device) -> Any:
    """Convert uint8 images, (N, H, W, 3), to a format. Raises ValueError for another one.

    "pil"     a list of PIL images
    "numpy"   the same array
    "torch"   floats in [-1, 1], (N, 3, H, W), on a device
    """
    if image_format == "pil":
        return [Image.fromarray(image) for image in pixels]
    if image_format == "numpy":
        return pixels
    if image_format == "torch":
        return to_float(torch.from_numpy(pixels), device)
    raise ValueError(f"format must be pil, numpy or torch, got {image_format!r}")
