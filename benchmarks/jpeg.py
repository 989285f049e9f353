"""Error of JPEG shards: bytes, distortion, and distance of the encoded images to the originals.

    python benchmarks/jpeg.py --source data/clothing-128.zip --size 128

Images are resized as `dataset.resize_mode: stretch` does, and encoded as `stages/shard.py` encodes them. Distances are
those of the report between an image set and its own JPEG: an exact copy would have 0.
"""

import io
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timing import arguments

from stages.config import DatasetConfig, EvaluateConfig
from stages.images.decode import encode
from stages.metrics.distortion import PIXEL_RANGE, psnr
from stages.metrics.features import FeatureNetwork
from stages.metrics.networks import read_networks
from stages.metrics.set_metrics import compare


def load(source: Path, size: int, count: int) -> np.ndarray:
    """Read the first images of an archive, resized: uint8 (N, H, W, 3)."""
    images = []
    with zipfile.ZipFile(source) as archive:
        names = [name for name in sorted(archive.namelist()) if Path(name).suffix.lower() in (".jpg", ".jpeg", ".png")]
        for name in names[:: max(1, len(names) // count)][:count]:
            with Image.open(io.BytesIO(archive.read(name))) as image:
                images.append(np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)))
    return np.stack(images)


def main() -> None:
    """Encode the images at several qualities and print a row for each."""
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--source", type=Path, default=Path("data/clothing-128.zip"))
    parser.add_argument("--size", type=int, default=128, help="side of the images, in pixels")
    parser.add_argument("--count", type=int, default=256, help="number of images")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    images = load(options.source, options.size, options.count)
    network = FeatureNetwork(read_networks(EvaluateConfig().networks)[0])
    features = network(images)
    png = [len(encode(image, DatasetConfig("", "x", options.size))) for image in images]
    print(f"{len(images)} images of {options.size} x {options.size}; PNG {np.mean(png):,.0f} bytes")
    for quality in (95, 90):
        config = DatasetConfig("", "x", options.size, image_format="jpeg", jpeg_quality=quality)
        files = [encode(image, config) for image in images]
        decoded = np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])
        mse = float(np.square((images.astype(np.float64) - decoded) * PIXEL_RANGE / 255).mean())
        values = compare(features, network(decoded), EvaluateConfig(), seed=0)
        distances = [f"{name} {np.atleast_1d(value)[0]:.4g}" for name, value in values.items()]
        size = np.mean([len(file) for file in files])
        print(f"quality {quality}: {size:,.0f} bytes, MSE {mse:.3g}, PSNR {psnr(mse):.1f} dB, {', '.join(distances)}")


if __name__ == "__main__":
    main()
