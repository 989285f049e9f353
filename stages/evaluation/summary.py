"""Metrics of an evaluation, computed from sums, counts and features: one function per section of the report's
metrics.json.

Each section states its number of images. Keys that end in `_se` are standard errors.

Axes: N images, D features, K codebook entries.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from models.priors import Grid
from stages.config import RULE_SETTINGS, EvaluateConfig
from stages.metrics import codecs, distortion, rate, usage
from stages.metrics.codecs import CodecSums
from stages.metrics.comparisons import COMPARISONS
from stages.metrics.distortion import DistortionSums
from stages.metrics.rate import LikelihoodSums

Metrics = dict[str, Any]  # nested, as JSON has them
DISTORTION_METRICS = ("mse", "psnr", "psnr_8bit", "ssim")


def sampling(meta: Mapping[str, Any]) -> Metrics:
    """Select from the metadata of the samples how they were drawn: the sampling rule and the fraction accepted."""
    return {name: meta[name] for name in (*RULE_SETTINGS, "accepted") if name in meta}


def reconstruction(sums: Mapping[str, Mapping[str, DistortionSums]]) -> Metrics:
    """Compute distortion by split, and by prefix of levels: split -> prefix and fill, such as "top/zeros" -> sums.

    The last prefix has all levels; its metrics are those of the split itself.
    """
    metrics: Metrics = {}
    for split, by_prefix in sums.items():
        all_levels = list(by_prefix)[-1]
        metrics[split] = {"images": int(by_prefix[all_levels].images), **distortion.summarize(by_prefix[all_levels])}
        for name, prefix_sums in by_prefix.items():
            if name != all_levels:
                metrics[split][name.replace("/", "_filled_with_")] = distortion.summarize(prefix_sums)
    if "train" in metrics and "validation" in metrics and metrics["train"]["mse"] > 0:
        metrics["mse_validation_to_train"] = metrics["validation"]["mse"] / metrics["train"]["mse"]
    return metrics


def codebook(counts: Mapping[str, Mapping[str, np.ndarray]]) -> Metrics:
    """Compute codebook usage: level -> split -> occurrences of each entry, (K,)."""
    metrics: Metrics = {}
    for level, by_split in counts.items():
        metrics[level] = {"entries": len(by_split["train"]), "collapsed": int(usage.is_collapsed(by_split["train"]))}
        metrics[level] |= {
            split: usage.summarize(split_counts) for split, split_counts in by_split.items() if split_counts.any()
        }
    return metrics


def likelihood(sums: Mapping[str, Mapping[str, LikelihoodSums]], levels: Mapping[str, Grid]) -> Metrics:
    """Compute the NLL per code: level -> split -> sums.

    Adds the NLL of a uniform prior, ln K, and the generalization gap, validation minus train.
    """
    metrics: Metrics = {}
    for level, by_split in sums.items():
        metrics[level] = {"uniform_nats_per_code": math.log(levels[level].entries)}
        for split, split_sums in by_split.items():
            metrics[level][split] = {"images": int(split_sums.images), **rate.summarize(split_sums)}
        if "train" in by_split and "validation" in by_split:
            metrics[level]["gap_nats_per_code"] = (
                metrics[level]["validation"]["nats_per_code"] - metrics[level]["train"]["nats_per_code"]
            )
    return metrics


def rates(
    levels: Mapping[str, Grid],
    likelihoods: Metrics,
    mse: float,
    *,
    split: str,
    image_size: int,
    column_bytes: Mapping[str, int],
    rows: int,
) -> Metrics:
    """Compute bits per image by level and in total: fixed (log2 K per code), under the priors, and in the files.

    `likelihoods` is the result of `likelihood`; its values of `split` are used. `mse` is that of the reconstructions of
    `split`. `column_bytes` are the bytes of each level's column in the files of codes, which have `rows` rows.
    """
    bits: dict[str, dict[str, float]] = {}
    for level, grid in levels.items():
        codes_per_image = grid.height * grid.width
        bits[level] = {"fixed": rate.fixed_bits(grid.entries, codes_per_image)}
        if split in likelihoods.get(level, {}):
            bits[level]["prior"] = codes_per_image * likelihoods[level][split]["bits_per_code"]
        if rows and level in column_bytes:
            bits[level]["files"] = 8 * column_bytes[level] / rows
    kinds = [kind for kind in ("fixed", "prior", "files") if all(kind in by_kind for by_kind in bits.values())]
    bits["total"] = {kind: sum(bits[level][kind] for level in levels) for kind in kinds}
    metrics: Metrics = {
        level: {kind: rate.summarize_bits(bits_per_image, image_size) for kind, bits_per_image in by_kind.items()}
        for level, by_kind in bits.items()
    }
    if mse > 0:
        metrics["pixels"] = {
            f"bits_per_dimension_{kind}": rate.pixel_bits_per_dimension(mse, bits["total"][kind], image_size)
            for kind in kinds
            if kind != "files"
        }
    return metrics


def comparisons(
    pairs: Mapping[str, tuple[np.ndarray, np.ndarray]], network: str, config: EvaluateConfig, seed: int
) -> Metrics:
    """Compute each metric of COMPARISONS that has enough images, for each pair of feature sets.

    `pairs` maps a name to the features of the reference images and of the compared images, (N, D) each. `network` is
    the name of the feature network and becomes a part of the keys.
    """
    metrics: Metrics = {}
    for name, (reference, features) in pairs.items():
        metrics[name] = {"images": len(features), "reference_images": len(reference)}
        for metric, comparison in COMPARISONS.items():
            if min(len(features), len(reference)) < comparison.min_images(config):
                continue
            result = comparison.compute(reference, features, config, seed)
            value, standard_error = result if isinstance(result, tuple) else (result, math.nan)
            metrics[name][f"{metric}_{network}"] = value
            if not math.isnan(standard_error):
                metrics[name][f"{metric}_{network}_se"] = standard_error
    return metrics


def headline(metrics: Metrics, network: str) -> Metrics:
    """Select the numbers that people compare between runs: of the samples, and of the reconstructions.

    All are of the validation images, or of the training images where there are few validation images.
    """
    samples, reconstructions = metrics["compared"]["samples"], metrics["reconstruction"][metrics["reference"]]
    compared = {name: samples[f"{name}_{network}"] for name in COMPARISONS if f"{name}_{network}" in samples}
    return compared | {name: reconstructions[name] for name in ("psnr", "ssim") if name in reconstructions}


def kid_ratios(compared: Metrics, network: str) -> Metrics:
    """Divide the KID of the samples by that of each baseline. A good prior gives a ratio far below 1."""
    kids = {name: values.get(f"kid_{network}") for name, values in compared.items()}
    return {
        f"kid_samples_to_{baseline}": kids["samples"] / kids[baseline]
        for baseline in ("random_codes", "shuffled_codes")
        if kids.get("samples") is not None and kids.get(baseline)
    }


def memorization(distances: Mapping[str, Mapping[str, np.ndarray]]) -> Metrics:
    """Summarize the distances, (N,), to the nearest training image: space -> image set -> distances.

    A distance of 0 is an exact copy. Samples closer than validation images indicate memorization.
    """
    metrics: Metrics = {}
    for space, by_set in distances.items():
        metrics[space] = {"images": min(len(values) for values in by_set.values())}
        metrics[space] |= {f"{name}_to_train_median": float(np.median(values)) for name, values in by_set.items()}
        metrics[space] |= {f"{name}_copies": int((values == 0).sum()) for name, values in by_set.items()}
    return metrics


def notes(metrics: Metrics, num_compared: int, config: EvaluateConfig) -> list[str]:
    """Return warnings for the reader: collapsed levels, omitted metrics, missing validation images, exact copies."""
    warnings = []
    for level, values in metrics["codebook"].items():
        if values["collapsed"]:
            warnings.append(
                f"Level {level} is collapsed: its perplexity is {values['train']['perplexity']:.1f} of "
                f"{values['entries']} entries, below {usage.COLLAPSED_BELOW:.0%}. Its prior has little to learn."
            )
    for name, comparison in COMPARISONS.items():
        min_images = comparison.min_images(config)
        if num_compared < min_images:
            warnings.append(
                f"{comparison.label} ({name}) is omitted: it needs {min_images} images of each set, got {num_compared}."
            )
    if metrics["reference"] == "train":
        warnings.append("There are few validation images, so image sets are compared with training images instead.")
    copies = metrics["neighbours"].get("pixels", {}).get("samples_copies", 0)
    if copies:
        warnings.append(f"{copies} samples are exact copies of training images, pixel by pixel.")
    return warnings


def rate_distortion(rates: Metrics, distortions: Metrics, levels: Sequence[str]) -> list[Metrics]:
    """Return one row per prefix of levels and kind of rate ("fixed", "prior", "files").

    `rates` is the result of `rates`, `distortions` that of `reconstruction` for one split. The levels after the prefix
    are filled with zeros: level dropout trains the decoder with this fill.
    """
    rows = []
    for kind in ("fixed", "prior", "files"):
        for count in range(1, len(levels) + 1):
            name = "+".join(levels[:count])
            values = distortions if count == len(levels) else distortions[f"{name}_filled_with_zeros"]
            if all(kind in rates[level] for level in levels[:count]):
                bits = sum(rates[level][kind]["bits_per_pixel"] for level in levels[:count])
                rows.append({"rate": kind, "point": name, "images": distortions["images"], "bits_per_pixel": bits})
                rows[-1] |= {metric: values[metric] for metric in DISTORTION_METRICS if metric in values}
    return rows


def codec_rate_distortion(sums: Mapping[str, CodecSums], image_size: int) -> list[Metrics]:
    """Return one row as those of `rate_distortion` per codec and quality, such as "jpeg/50".

    Their rate leaves out the header of the files, whose bits are given apart.
    """
    rows = []
    for name, codec_sums in sums.items():
        codec, quality = name.split("/")
        rows.append({"rate": codec, "point": f"quality {quality}", **codecs.summarize(codec_sums, image_size)})
    return rows
