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
from stages.metrics.distortion import DistortionSums
from stages.metrics.networks import Network
from stages.metrics.rate import LikelihoodSums
from stages.metrics.set_metrics import SET_METRICS, Value, compare

Metrics = dict[str, Any]  # nested, as JSON has them
BASELINES = ("random_codes", "shuffled_codes")  # images decoded from codes that no prior made
HEADLINE_SET_METRICS = ("kid", "frechet", "precision", "recall")  # more do not fit on a screen
DISTORTION_METRICS = ("mse", "psnr", "psnr_8bit", "ssim", "stlpips")


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
    pairs: Mapping[str, tuple[np.ndarray, np.ndarray]], network: Network, config: EvaluateConfig, seed: int
) -> Metrics:
    """Compute the metrics of a few pairs of image sets in this process.

    `pairs` maps a name to the features of the reference images and of the compared images, (N, D) each.
    """
    metrics: Metrics = {}
    for name, (reference, images) in pairs.items():
        values = {network.name: {name: compare(reference, images, config, seed)}}
        metrics |= name_metrics(values, [network], len(images))
        metrics[name]["reference_images"] = len(reference)
    return metrics


def name_metrics(
    compared: Mapping[str, Mapping[str, Mapping[str, Value]]], networks: Sequence[Network], num_images: int
) -> Metrics:
    """Name the metrics of pairs of image sets: network -> name of the pair -> metric -> value.

    The name of the feature network becomes a part of the keys. All sets have `num_images` images.
    """
    metrics: Metrics = {}
    for network in networks:
        for name, values in compared[network.name].items():
            of_pair = metrics.setdefault(name, {"images": num_images, "reference_images": num_images})
            for metric, result in values.items():
                value, standard_error = result if isinstance(result, tuple) else (result, math.nan)
                of_pair[network.key(metric)] = value
                if not math.isnan(standard_error):
                    of_pair[f"{network.key(metric)}_se"] = standard_error
    return metrics


def headline(metrics: Metrics, networks: Sequence[Network]) -> Metrics:
    """Select the numbers that people compare between runs: of the samples, and of the reconstructions.

    All are of the validation images, or of the training images where there are few validation images. The metrics of
    samples are those of the first network, and the FID if a network is FID's own.
    """
    samples, reconstructions = metrics["compared"]["samples"], metrics["reconstruction"][metrics["reference"]]
    keys = {name: networks[0].key(name) for name in HEADLINE_SET_METRICS}
    keys |= {"fid": "fid"}
    compared = {name: samples[key] for name, key in keys.items() if key in samples}
    return compared | {name: reconstructions[name] for name in ("psnr", "ssim") if name in reconstructions}


def kid_ratios(compared: Metrics, network: Network) -> Metrics:
    """Divide the KID of the samples by that of each baseline. A good prior gives a ratio far below 1."""
    kids = {name: values.get(network.key("kid")) for name, values in compared.items()}
    return {
        f"kid_samples_to_{baseline}": kids["samples"] / kids[baseline]
        for baseline in BASELINES
        if kids.get("samples") is not None and kids.get(baseline)
    }


def memorization(distances: Mapping[str, Mapping[str, np.ndarray]], num_searched: int) -> Metrics:
    """Summarize the distances, (N,), to the nearest of `num_searched` training images: space -> image set -> distances.

    A distance of 0 is an exact copy. Samples closer than validation images indicate memorization.
    """
    metrics: Metrics = {}
    for space, by_set in distances.items():
        metrics[space] = {"images": min(len(values) for values in by_set.values()), "searched": num_searched}
        metrics[space] |= {f"{name}_to_train_median": float(np.median(values)) for name, values in by_set.items()}
        metrics[space] |= {f"{name}_copies": int((values == 0).sum()) for name, values in by_set.items()}
    return metrics


def notes(metrics: Metrics, num_compared: int, networks: Sequence[Network], config: EvaluateConfig) -> list[str]:
    """Return warnings for the reader: collapsed levels, omitted metrics, missing validation images, exact copies, and
    baselines that are better than the samples."""
    warnings = []
    for level, values in metrics["codebook"].items():
        if values["collapsed"]:
            warnings.append(
                f"Level {level} is collapsed: its perplexity is {values['train']['perplexity']:.1f} of "
                f"{values['entries']} entries, below {usage.COLLAPSED_BELOW:.0%}. Its prior has little to learn."
            )
    for name, metric in SET_METRICS.items():
        min_images = metric.min_images(config)
        if num_compared < min_images:
            warnings.append(
                f"{metric.label} ({name}) is omitted: it needs {min_images} images of each set, got {num_compared}."
            )
    if metrics["reference"] == "train" and config.reference == "auto":
        warnings.append("There are few validation images, so image sets are compared with training images instead.")
    for baseline in BASELINES:
        for network in networks:
            if better := _better_than_samples(metrics["compared"], baseline, network):
                warnings.append(
                    f"The baseline of {baseline.replace('_', ' ')} beats the samples by features of {network.name} in "
                    f"{', '.join(better)}: there the priors are of no use, or the metric misses what they learned."
                )
    copies = metrics["neighbours"].get("pixels", {}).get("samples_copies", 0)
    if copies:
        warnings.append(f"{copies} samples are exact copies of training images, pixel by pixel.")
    return warnings


def _better_than_samples(compared: Metrics, baseline: str, network: Network) -> list[str]:
    """List the metrics by which a baseline is better than the samples, with both values."""
    better = []
    for name, metric in SET_METRICS.items():
        of_samples, of_baseline = (
            compared.get(image_set, {}).get(network.key(name)) for image_set in ("samples", baseline)
        )
        if of_samples is None or of_baseline is None:
            continue
        if of_baseline < of_samples if metric.better == "lower" else of_baseline > of_samples:
            better.append(f"{name} ({of_baseline:.4g}, samples {of_samples:.4g})")
    return better


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
