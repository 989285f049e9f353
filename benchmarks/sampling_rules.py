"""Quality of samples by sampling rule: KID, precision and recall over temperature and the scale of guidance.

    python benchmarks/sampling_rules.py artifacts --temperature 0.9 1.0 --guidance 1 1.5 2

Draws samples of the trained models in a folder of artifacts with every combination of `--guidance`, which all levels
use, `--temperature` of the coarsest level, `--fine-temperature` of the others and, of three levels or more,
`--finest-temperature` of the finest one, for each seed. Compares them with all validation images by EfficientNet-Lite0;
with `--against reconstructions`, with their reconstructions, which excludes the errors of the VQ-VAE. Prints means over
the seeds, and behind them the standard deviation, with one seed only the standard error of KID. A choice among many
rows by the validation images is slightly optimistic.

Axes: N images, H rows, W columns, 3 colours.
"""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from stages.config import EvaluateConfig, LevelRule, SampleConfig
from stages.errors import UserError
from stages.formats.shards import open_shards
from stages.images.tensors import to_float, to_uint8
from stages.inference.trained_models import TrainedModels, choose_labels
from stages.metrics.features import FeatureNetwork
from stages.metrics.networks import read_networks
from stages.metrics.set_metrics import compare

BATCH = 64
METRICS = ("kid", "frechet", "precision", "recall", "coverage")


@torch.inference_mode()
def reconstruct(models: TrainedModels, images: np.ndarray) -> np.ndarray:
    """Encode and decode (N, H, W, 3) uint8 images."""
    batches = torch.from_numpy(images).split(BATCH)
    return np.concatenate([to_uint8(models.vqvae(to_float(batch, "cpu")).reconstruction.numpy()) for batch in batches])


def draw(models: TrainedModels, config: SampleConfig, seed: int) -> np.ndarray:
    """Draw samples as the stage does: (N, H, W, 3) uint8."""
    labels, batches = choose_labels(models, config).tolist(), []
    for start in range(0, config.count, BATCH):
        batch = labels[start : start + BATCH]
        batches.append(models.draw(range(start, start + len(batch)), batch, config, seed)[1])
    return np.concatenate(batches)


def describe(values: Sequence[np.ndarray]) -> str:
    """Format one metric of all seeds; a value may have a standard error after it."""
    mean = f"{np.mean([value[0] for value in values]):.4g}"
    if len(values) > 1:
        return f"{mean} ± {np.std([value[0] for value in values], ddof=1):.2g}"
    return f"{mean} ± {values[0][1]:.2g}" if len(values[0]) > 1 else mean


def main() -> None:
    """Print a row for each combination."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", type=Path, help="folder with shards, vqvae and priors")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0])
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.9], help="of the coarsest level")
    parser.add_argument("--fine-temperature", type=float, nargs="+", default=[0.01], help="of the other levels")
    parser.add_argument("--finest-temperature", type=float, nargs="+", help="default: as the other fine levels")
    parser.add_argument("--count", type=int, default=256, help="samples of each combination and seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--against", choices=("images", "reconstructions"), default="images")
    parser.add_argument("--threads", type=int, default=1, help="threads torch may use")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        models = TrainedModels.load(options.artifacts / "vqvae", options.artifacts / "priors")
        validation = open_shards(options.artifacts / "shards").split("validation")
        levels, configs = list(models.priors), []
        coarsest, finest = levels[0], levels[-1]
        if options.finest_temperature and len(levels) < 3:
            parser.error(f"--finest-temperature needs three levels or more, got {len(levels)}")
        for guidance, temperature, fine_temperature, finest_temperature in itertools.product(
            options.guidance, options.temperature, options.fine_temperature, options.finest_temperature or [None]
        ):
            rules = {coarsest: LevelRule(temperature=temperature)}
            if finest_temperature:
                rules[finest] = LevelRule(temperature=finest_temperature)
            config = SampleConfig(options.count, temperature=fine_temperature, guidance=guidance, level_rules=rules)
            models.require_drawable(config, where="--guidance")
            configs.append(config)
    except (UserError, ValueError) as error:
        parser.error(str(error))
    min_images = EvaluateConfig().precision_recall_k + 1
    if min(len(validation), options.count) < min_images:
        parser.error(
            f"recall needs {min_images} validation images and samples, got {len(validation)} and {options.count}"
        )
    images = np.stack([validation.read(position) for position in range(len(validation))])
    if options.against == "reconstructions":
        images = reconstruct(models, images)
    network = FeatureNetwork(read_networks(EvaluateConfig().networks)[0])
    reference = network(images)
    print(f"{options.count} samples, {len(images)} validation {options.against}, seeds {options.seeds}")
    print(f"{'guidance':>9}{'coarsest':>9}{'finer':>7}{'finest':>7}" + "".join(f"{name:>18}" for name in METRICS))
    for config in configs:
        results = [
            compare(reference, network(draw(models, config, seed)), EvaluateConfig(), 0) for seed in options.seeds
        ]
        cells = (describe([np.ravel(result[name]) for result in results]) for name in METRICS)
        temperature, finest_temperature = (config.rule(level)["temperature"] for level in (coarsest, finest))
        print(
            f"{config.guidance:9g}{temperature:9g}{config.temperature:7g}{finest_temperature:7g}"
            + "".join(f"{cell:>18}" for cell in cells),
            flush=True,
        )


if __name__ == "__main__":
    main()
