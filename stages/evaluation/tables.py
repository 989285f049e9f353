"""Summary cards and tables of the report."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from models.priors import Grid
from models.vqvae import FILLS
from stages.evaluation import ladder
from stages.evaluation.report_data import ReportData
from stages.metrics.codecs import CODECS
from stages.metrics.networks import Network
from stages.metrics.set_metrics import SET_METRICS

SPLITS = ("validation", "train")
SPLIT_LABELS = {"validation": "validation", "train": "training"}
MISSING = "–"  # cell of a metric that was not computed
SET_LABELS = {
    "samples": "samples",
    "samples_to_reconstructions": "samples, compared with reconstructions",
    "reconstructions": "reconstructions",
    "random_codes": "baseline: random codes",
    "shuffled_codes": "baseline: shuffled codes",
}
TO_TRAIN = "_to_train"  # end of the name of a pair that is compared with the training images as well
RATE_LABELS = {
    "fixed": "fixed length, log2 K",
    "prior": "under the prior",
    "files": "in files",
    **{name: codec.label for name, codec in CODECS.items()},
}


def space_name(space: str) -> str:
    """Name a space of nearest neighbours: "features_NAME" is "features of NAME"."""
    return space.replace("_", " of ", 1)


def space_label(space: str) -> str:
    """Name a space of nearest neighbours and its unit."""
    return "pixels (RMS, 8-bit levels)" if space == "pixels" else f"{space_name(space)} (Euclidean)"


PERCEPTUAL_CAPTION = (
    "ST-LPIPS, the perceptual distance of Ghildyal and Liu 2022 with VGG-16: lower is better. It is made for "
    "photographs of 64 pixels or more."
)


class Card(NamedTuple):
    """A key metric at the top of the page."""

    label: str
    value: str
    unit: str
    remark: str


class Table(NamedTuple):
    """A table whose first `text_columns` columns are text and whose others are numbers. The first is the row header."""

    caption: str
    text_columns: int
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def cards(data: ReportData) -> list[Card]:
    """Select the key metrics: of the validation images, or of the training images where there are few of those."""
    metrics, split = data.metrics, data.metrics["reference"]
    images = f"{SPLIT_LABELS[split]} images"
    cards = []
    reconstruction = metrics["reconstruction"][split]
    if "psnr" in reconstruction:
        remark = f"PSNR of {images}; {reconstruction['psnr_8bit']:.2f} dB as the mean over 8-bit images; "
        remark += "higher is better"
        cards.append(Card("Reconstruction", f"{reconstruction['psnr']:.2f}", "dB", remark))
    for level, likelihood in metrics["likelihood"].items():
        if split in likelihood:
            remark = f"NLL of {images}; lower is better; a uniform prior has {likelihood['uniform_nats_per_code']:.2f}"
            cards.append(Card(f"Prior, {level}", f"{likelihood[split]['nats_per_code']:.3f}", "nats/code", remark))
    for level, usage in metrics["codebook"].items():
        if split in usage:
            perplexity = f"{usage[split]['perplexity']:.0f}"
            cards.append(
                Card(
                    f"Perplexity, {level}",
                    perplexity,
                    f"of {usage['entries']}",
                    f"effective number of entries in {images}",
                )
            )
    total = metrics["rate"]["total"]
    rate = total.get("prior", total["fixed"])
    remark = f"{'NLL of the codes' if 'prior' in total else 'codes of fixed length'} of {images}; 24 uncompressed"
    cards.append(Card("Rate", f"{rate['bits_per_pixel']:.3f}", "bits/pixel", remark))
    samples, kid = metrics["compared"]["samples"], data.networks[0].key("kid")
    if kid in samples:
        random_codes = metrics["compared"]["random_codes"].get(kid)
        remark = f"compared with {images}; lower is better"
        remark += f"; random codes have {random_codes:.4f}" if random_codes is not None else ""
        error = f"± {samples[f'{kid}_se']:.4f}" if f"{kid}_se" in samples else ""
        cards.append(Card("KID of samples", f"{samples[kid]:.4f}", error, remark))
    return cards


def tables(data: ReportData) -> dict[str, Table]:
    """Build all tables, by section of the page."""
    return {
        "compared": _comparison_table(data),
        **({"ladder": _ladder_table(data)} if data.rungs else {}),
        "reconstruction": _reconstruction_table(data),
        "memorization": _memorization_table(data),
        "codebook": _codebook_table(data),
        "likelihood": _likelihood_table(data),
        "rate": _rate_table(data),
        "rate_distortion": _rate_distortion_table(data),
    }


def _comparison_table(data: ReportData) -> Table:
    labels = SET_LABELS | {
        name + TO_TRAIN: f"{label}, compared with training images" for name, label in SET_LABELS.items()
    }
    compared = {name: values for name, values in data.metrics["compared"].items() if name in labels}
    rows = []
    for network in data.networks:
        for name in sorted(compared, key=list(labels).index):
            label = labels[name] if len(data.networks) == 1 else f"{labels[name]}, by {network.name}"
            rows.append([label, str(compared[name]["images"]), *_comparison_cells(compared[name], network)])
    caption = (
        f"Compared with N {SPLIT_LABELS[data.metrics['reference']]} images unless stated otherwise, by features of "
        f"{', '.join(network.name for network in data.networks)}. ± is one standard error. All but KID depend on N: "
        "compare only values of the same N. Reconstructions are compared with their own originals, as usual, and so "
        "seem better than independent images would; the quality ladder compares them with other images."
    )
    return Table(caption, 1, ["images", "N", *_comparison_headings()], rows)


def _ladder_table(data: ReportData) -> Table:
    """Table of the quality ladder: each rung, and by how much its model increases KID."""
    ladder_metrics, models = data.metrics["ladder"], ladder.rungs(data.levels)
    rows = []
    for name, label in ladder.labels(data.levels).items():
        step = ladder_metrics["steps"].get(models[name], {})
        increase = f"{step['kid_increase']:+.4f}" if step else MISSING
        rows.append([label, increase, *_comparison_cells(ladder_metrics[name], data.networks[0])])
    split, count = SPLIT_LABELS[data.metrics["reference"]], ladder_metrics["originals"]["images"]
    caption = (
        f"{count} images of each rung, compared with {count} other {split} images by features of "
        f"{data.networks[0].name}. Drawn codes follow the sampling rule of the samples. ± is one standard error."
    )
    if ladder_metrics["steps"] and models["samples"] not in ladder_metrics["steps"]:
        caption += " The samples have other classes than these images, so their KID is not that of one prior."
    return Table(caption, 1, ["images", "KID increase", *_comparison_headings()], rows)


def _comparison_headings() -> list[str]:
    return [f"{metric.label} ({metric.better} is better)" for metric in SET_METRICS.values()]


def _comparison_cells(values: Mapping[str, float], network: Network) -> list[str]:
    return [_comparison_cell(values, network.key(metric)) for metric in SET_METRICS]


def _comparison_cell(values: Mapping[str, float], key: str) -> str:
    if key not in values:
        return MISSING
    error = values.get(f"{key}_se")
    return f"{values[key]:.4g}" if error is None else f"{values[key]:.4f} ± {error:.4f}"


def _reconstruction_table(data: ReportData) -> Table:
    rows = []
    perceptual = _perceptual_heading(data)
    for split in SPLITS:
        by_prefix = data.metrics["reconstruction"].get(split)
        for name in data.reconstructions if by_prefix else ():
            prefix, fill = name.split("/")
            if fill not in FILLS:  # codes drawn from a prior are pictures only: their distortion says little
                continue
            # The metrics of all levels are those of the split itself.
            values = by_prefix.get(name.replace("/", "_filled_with_"), by_prefix)
            fill_cell = MISSING if values is by_prefix else fill
            cells = [f"{values['mse']:.5f}", _format(values, "psnr", 2), _format(values, "psnr_8bit", 2)]
            cells += [_format(values, "ssim", 3), *(_format(values, "stlpips", 4) for _ in perceptual)]
            rows.append([SPLIT_LABELS[split], prefix.replace("+", ", "), fill_cell, *cells])
    caption = (
        "Pixels in [-1, 1]. MSE: lower is better. PSNR and SSIM: higher is better. PSNR is that of this table's MSE; "
        "8-bit PSNR is the mean of each image's PSNR after rounding to 8 bits, which most papers report."
    )
    if perceptual:
        caption += f" {PERCEPTUAL_CAPTION}"
    header = ["images", "decoded levels", "other levels", "MSE", "PSNR, dB", "8-bit PSNR, dB", "SSIM", *perceptual]
    return Table(caption, 3, header, rows)


def _perceptual_heading(data: ReportData) -> list[str]:
    """Return the heading of the perceptual distance, or nothing if it was not measured."""
    return ["ST-LPIPS"] if "stlpips" in data.metrics["reconstruction"][data.metrics["reference"]] else []


def _memorization_table(data: ReportData) -> Table:
    rows = [
        [space_label(space), name, f"{np.median(distances):.3f}", str(int((distances == 0).sum()))]
        for space, by_set in data.nearest_distances.items()
        for name, distances in by_set.items()
    ]
    searched = next(iter(data.metrics["neighbours"].values()))["searched"]
    caption = (
        f"Median distance to the nearest of {searched:,} training images. Samples much closer than validation images "
        "can be memorized."
    )
    return Table(caption, 2, ["space", "images", "median", "exact copies"], rows)


def _codebook_table(data: ReportData) -> Table:
    rows = [
        [
            level,
            SPLIT_LABELS[split],
            _grid(data.levels[level]),
            str(data.levels[level].entries),
            _format(values, "perplexity", 1),
            str(values["used_entries"]),
        ]
        for level, split, values in _by_split(data.metrics["codebook"])
    ]
    caption = "Perplexity: the effective number of entries in use, at most the number of entries. Over all images."
    return Table(caption, 3, ["level", "images", "grid", "entries", "perplexity", "used"], rows)


def _likelihood_table(data: ReportData) -> Table:
    likelihood = data.metrics["likelihood"]
    rows = [
        [
            level,
            SPLIT_LABELS[split],
            str(values["images"]),
            _format(values, "nats_per_code", 4),
            _format(values, "nats_per_code_se", 4),
            _format(values, "bits_per_code", 4),
            _format(likelihood[level], "uniform_nats_per_code", 4),
        ]
        for level, split, values in _by_split(likelihood)
    ]
    caption = (
        "Negative log-likelihood (NLL) per code; lower is better. Validation above training is a generalization gap."
    )
    return Table(caption, 2, ["level", "images", "N", "nats", "± s.e.", "bits", "uniform, nats"], rows)


def _rate_table(data: ReportData) -> Table:
    rows = [
        [
            level,
            RATE_LABELS[kind],
            _format(values, "bits_per_pixel", 4),
            _format(values, "bits_per_dimension", 4),
            _format(values, "compression", 1),
        ]
        for level in (*data.levels, "total")
        for kind, values in data.metrics["rate"][level].items()
    ]
    caption = (
        "Compression is relative to 24 bits per pixel. Under the prior: the NLL, which no file attains here. "
        "In files: the level's Parquet column, with its overhead."
    )
    return Table(caption, 2, ["codes", "rate", "bits/pixel", "bits/dimension", "compression"], rows)


def _rate_distortion_table(data: ReportData) -> Table:
    perceptual = _perceptual_heading(data)
    rows = [
        [
            RATE_LABELS[row["rate"]],
            row["point"].replace("+", ", "),
            str(row["images"]),
            _format(row, "bits_per_pixel", 3),
            _format(row, "header_bits_per_pixel", 3),
            _format(row, "mse", 5),
            _format(row, "psnr", 2),
            _format(row, "psnr_8bit", 2),
            _format(row, "ssim", 3),
            *(_format(row, "stlpips", 4) for _ in perceptual),
        ]
        for row in data.metrics["rate_distortion"]
    ]
    header = ["rate", "levels or quality", "N", "bits/pixel", "header", "MSE", "PSNR, dB", "8-bit PSNR, dB", "SSIM"]
    header += perceptual
    return Table(_rate_distortion_caption(data), 2, header, rows)


def _rate_distortion_caption(data: ReportData) -> str:
    """Say what the points are, and which codecs are left out."""
    kinds = {row["rate"] for row in data.metrics["rate_distortion"]}
    split, images = SPLIT_LABELS[data.metrics["reference"]], data.metrics["rate_distortion"][0]["images"]
    caption = f"Of the first {images} {split} images, "
    caption += "the same for all points; the rate in files is that of all images. "
    caption += "Levels that are not named are zeros, as in the table of reconstructions. "
    missing = [codec.label for name, codec in CODECS.items() if name not in kinds]
    if len(missing) == len(CODECS):
        return caption
    caption += (
        "Files of JPEG, WebP and AVIF are counted without their headers, which a set of images could share and which "
        "take most bytes of small images."
    )
    if missing:
        caption += f" {', '.join(missing)}: left out, because this Pillow cannot write such files."
    return caption


def _by_split(metrics: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield level, split and values of metrics by level and split."""
    for level, by_split in metrics.items():
        for split in SPLITS:
            if split in by_split:
                yield level, split, by_split[split]


def _grid(grid: Grid) -> str:
    return f"{grid.height} x {grid.width}"


def _format(values: Mapping[str, float], name: str, digits: int) -> str:
    return f"{values[name]:.{digits}f}" if name in values else MISSING
