"""`vqvae2 reconstruct`: image files encoded and decoded by the trained VQ-VAE.

B images, H x W pixels, 3 color channels.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from pipeline.image_commands import MODEL, replace_folder, require_model, require_replaceable, safe_name
from stages.errors import UserError
from stages.formats import model_file
from stages.images.contact_sheet import contact_sheet
from stages.images.tensors import to_float, to_uint8
from stages.inference.images import image_settings, read_file
from stages.metrics import distortion

KIND = "reconstructions"


def run(images: Sequence[Path], out: Path, model: Path = MODEL) -> int:
    """Reconstruct images and print the error of each and the folder; return the exit status."""
    print("\n".join(reconstruct(images, out, model)))
    print(out)
    return 0


def reconstruct(images: Sequence[Path], out: Path, model: Path = MODEL) -> list[str]:
    """Reconstruct image files from each prefix of levels, coarse to fine; return one line per image with its PSNRs.

    Writes one picture per image: the image, then its reconstructions. Images are resized as the training images were.
    Earlier reconstructions in `out` are replaced. Raises UserError if `out` holds anything else, if the model is
    missing or does not quantize, or if an image cannot be read.
    """
    require_replaceable(out, KIND)
    require_model(model, "vqvae")
    network, vqvae = model_file.load_vqvae(model / "vqvae")
    if network.config.quantizer.mode == "none":
        raise UserError(
            "This VQ-VAE does not quantize, so it has no codes to reconstruct images from.",
            where=model / "vqvae",
            fix="Train a VQ-VAE with vqvae.quantizer.mode ema or loss.",
            code=2,
        )
    settings = image_settings(vqvae.meta)
    levels = list(network.config.levels)
    decoded_images = [read_file(path, settings) for path in images]  # all of them before anything is written
    lines = []
    with replace_folder(out, KIND, {"vqvae": vqvae.digest}) as folder:
        for number, (path, image) in enumerate(zip(images, decoded_images, strict=True)):
            batch = to_float(torch.from_numpy(image[None]), torch.device("cpu"))  # (1, 3, H, W)
            with torch.inference_mode():
                reconstructions = network.decode_prefixes(network.encode(batch))
            row = np.concatenate(
                [image[None], *(to_uint8(pixels.numpy()) for pixels in reconstructions)]
            )  # (B, H, W, 3)
            (folder / f"{number:03d}-{safe_name(path.stem)}.png").write_bytes(contact_sheet(row, columns=len(row)))
            errors = [(pixels - batch).square().mean().item() for pixels in reconstructions]
            psnrs = [distortion.psnr(mse) for mse in errors]
            texts = (f"{'+'.join(levels[:count])} {psnr:.1f} dB" for count, psnr in enumerate(psnrs, 1))
            lines.append(f"{path}: {', '.join(texts)}")
    return lines
