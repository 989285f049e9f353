"""From what the parts of an evaluation measured to its numbers: pure functions, one per heading of metrics.json.

Names say what is measured on what, each with its number of images. Keys that end in `_se` are standard errors.
"""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.priors import Grid
from stages.config import EvaluateConfig
from stages.metrics import COMPARISONS, distortion, rate, usage
from stages.metrics.distortion import DistortionSums
from stages.metrics.rate import LikelihoodSums

Numbers = dict[str, Any]


def reconstruction(sums: Mapping[str, Mapping[str, DistortionSums]]) -> Numbers:
    """Distortion by split, and by prefix of levels and what fills the rest: split -> "top/zeros" -> sums."""
    numbers: Numbers = {}
    for split, found in sums.items():
        whole = list(found)[-1]
        numbers[split] = {"images": int(found[whole].images), **distortion.summarize(found[whole])}
        for name, part in found.items():
            if name != whole:
                numbers[split][name.replace("/", "_filled_with_")] = distortion.summarize(part)
    if "train" in numbers and "validation" in numbers and numbers["train"]["mse"] > 0:
        numbers["mse_validation_to_train"] = numbers["validation"]["mse"] / numbers["train"]["mse"]
    return numbers


def codebook(counts: Mapping[str, Mapping[str, np.ndarray]]) -> Numbers:
    """Usage by level and split: level -> split -> counts of entries."""
    numbers: Numbers = {}
    for level, splits in counts.items():
        numbers[level] = {"entries": len(splits["train"]), "collapsed": int(usage.is_collapsed(splits["train"]))}
        numbers[level] |= {split: usage.summarize(found) for split, found in splits.items() if found.any()}
    return numbers


def likelihood(sums: Mapping[str, Mapping[str, LikelihoodSums]], levels: Mapping[str, Grid]) -> Numbers:
    """NLL per code by level and split, what a uniform prior would give, and the gap that overfitting opens."""
    numbers: Numbers = {}
    for level, splits in sums.items():
        numbers[level] = {"uniform_nats_per_code": math.log(levels[level].entries)}
        for split, found in splits.items():
            numbers[level][split] = {"images": int(found.images), **rate.summarize(found)}
        if "train" in splits and "validation" in splits:
            numbers[level]["gap_nats_per_code"] = (
                numbers[level]["validation"]["nats_per_code"] - numbers[level]["train"]["nats_per_code"]
            )
    return numbers


def rates(
    levels: Mapping[str, Grid],
    likelihoods: Numbers,
    mse: float,
    *,
    split: str,
    image_size: int,
    column_bytes: Mapping[str, int],
    rows: int,
) -> Numbers:
    """Bits per image by level and in total: at log2 K per code, under the priors (of `split`), and in the files.

    `rows` are the rows of the files that `column_bytes` measures. `mse` is that of the reconstructions of `split`.
    """
    bits: dict[str, dict[str, float]] = {}
    for level, shape in levels.items():
        codes = shape.height * shape.width
        bits[level] = {"fixed": rate.fixed_bits(shape.entries, codes)}
        if split in likelihoods.get(level, {}):
            bits[level]["prior"] = codes * likelihoods[level][split]["bits_per_code"]
        if rows and level in column_bytes:
            bits[level]["files"] = 8 * column_bytes[level] / rows
    kinds = [kind for kind in ("fixed", "prior", "files") if all(kind in found for found in bits.values())]
    bits["total"] = {kind: sum(bits[level][kind] for level in levels) for kind in kinds}
    numbers: Numbers = {
        name: {kind: rate.summarize_bits(found, image_size) for kind, found in kinds.items()}
        for name, kinds in bits.items()
    }
    if mse > 0:
        numbers["pixels"] = {
            f"bits_per_dimension_{kind}": rate.pixel_bits_per_dimension(mse, bits["total"][kind], image_size)
            for kind in kinds
            if kind != "files"
        }
    return numbers


def comparisons(
    pairs: Mapping[str, tuple[np.ndarray, np.ndarray]], network: str, config: EvaluateConfig, seed: int
) -> Numbers:
    """Hold features against a reference's, by every line of COMPARISONS that has images enough.

    `pairs` maps a name to the features of the reference, and of the images.
    """
    numbers: Numbers = {}
    for name, (reference, features) in pairs.items():
        numbers[name] = {"images": len(features), "reference_images": len(reference)}
        for measure, comparison in COMPARISONS.items():
            if min(len(features), len(reference)) < comparison.fewest(config):
                continue
            found = comparison.measure(reference, features, config, seed)
            value, error = found if isinstance(found, tuple) else (found, math.nan)
            numbers[name][f"{measure}_{network}"] = value
            if not math.isnan(error):
                numbers[name][f"{measure}_{network}_se"] = error
    return numbers


def ratios(compared: Numbers, network: str) -> Numbers:
    """KID of the samples as a share of each control's: well below 1 where the priors have learnt something."""
    kids = {name: found.get(f"kid_{network}") for name, found in compared.items()}
    return {
        f"kid_samples_to_{control}": kids["samples"] / kids[control]
        for control in ("random_codes", "shuffled_codes")
        if kids.get("samples") is not None and kids.get(control)
    }


def memorization(distances: Mapping[str, Mapping[str, np.ndarray]]) -> Numbers:
    """How near the nearest training image is: space -> set -> distance of every image to its nearest."""
    numbers: Numbers = {}
    for space, sets in distances.items():
        numbers[space] = {"images": min(len(found) for found in sets.values())}
        numbers[space] |= {f"{name}_to_train_median": float(np.median(found)) for name, found in sets.items()}
        numbers[space] |= {f"{name}_copies": int((found == 0).sum()) for name, found in sets.items()}
    return numbers


def notes(numbers: Numbers, compared: int, config: EvaluateConfig) -> list[str]:
    """Say in sentences what a reader must not miss."""
    said = []
    for level, found in numbers["codebook"].items():
        if found["collapsed"]:
            said.append(
                f"Level {level} is collapsed: its perplexity is {found['train']['perplexity']:.1f} of "
                f"{found['entries']} entries, below a quarter, so it leaves its prior little to learn."
            )
    for name, comparison in COMPARISONS.items():
        needed = comparison.fewest(config)
        if compared < needed:
            said.append(f"{comparison.label} ({name}) needs {needed} images of each set; here there are {compared}.")
    if numbers["reference"] == "train":
        said.append("There are few validation images, so sets of images are held against training images.")
    copies = numbers["neighbours"].get("pixels", {}).get("samples_copies", 0)
    if copies:
        said.append(f"{copies} samples are, pixel by pixel, training images.")
    return said


def write_plots(folder: Path, numbers: Numbers, counts: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Write what DVC draws: rate against distortion, likelihoods, and each level's usage."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "rate_distortion.csv", RATE_DISTORTION, rate_distortion(numbers))
    _write(
        folder / "nll.csv",
        ["level", "split", "nats_per_code", "bits_per_code"],
        [
            [level, split, found[split]["nats_per_code"], found[split]["bits_per_code"]]
            for level, found in numbers["likelihood"].items()
            for split in ("train", "validation")
            if split in found
        ],
    )
    for level, splits in counts.items():
        order = np.argsort(-splits["train"], kind="stable")
        shares = {split: found[order] / max(1, found.sum()) for split, found in splits.items()}
        columns = zip(*(share.tolist() for share in shares.values()), strict=True)
        _write(
            folder / f"usage_{level}.csv",
            ["rank", *shares],
            [[rank, *row] for rank, row in enumerate(columns, 1)],
        )


RATE_DISTORTION = ["levels", "rate", "bits_per_pixel", "mse", "psnr"]


def rate_distortion(numbers: Numbers) -> list[list[Any]]:
    """A row per prefix of levels and kind of rate, finer levels filled with their mean: the columns above."""
    split = numbers["reference"]
    found, rows = numbers["reconstruction"][split], []
    levels = list(numbers["codebook"])
    for count in range(1, len(levels) + 1):
        name = "+".join(levels[:count])
        shown = found if count == len(levels) else found[f"{name}_filled_with_mean"]
        for kind in ("fixed", "prior"):
            if all(kind in numbers["rate"][level] for level in levels[:count]):
                bits = sum(numbers["rate"][level][kind]["bits_per_pixel"] for level in levels[:count])
                rows.append([name, kind, bits, shown["mse"], shown.get("psnr", "")])
    return rows


def flat(numbers: Mapping[str, Any], path: str = "") -> dict[str, float]:
    """Join nested names by dots, and leave out what is no number."""
    found: dict[str, float] = {}
    for name, value in numbers.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{path}{name}.")
        elif isinstance(value, int | float):
            found[f"{path}{name}"] = float(value)
    return found


def _write(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
