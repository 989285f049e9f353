"""One page that shows what a run is worth: pictures first, then the numbers, then what they were made from.

The page is one file that asks nobody for anything: pictures and charts lie inside it.
"""

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from PIL import Image

from models.priors import Grid
from stages.evaluation import charts, summary
from stages.images.contact_sheet import PAPER, contact_sheet
from stages.metrics import COMPARISONS

Curve = Sequence[tuple[int, str, float]]  # step, name such as "validation/mse", value
LARGEST_SHOWN = 96  # pixels; larger images are reduced on the page, and whole in the sheets beside it
COLUMNS = 8

SETS = {
    "samples": "samples",
    "samples_to_reconstructions": "samples, against reconstructions",
    "reconstructions": "reconstructions",
    "random_codes": "random codes, decoded",
    "shuffled_codes": "shuffled codes, decoded",
}


@dataclass(frozen=True)
class Report:
    """Everything the page shows."""

    numbers: Mapping[str, Any]  # as in metrics.json
    notes: Sequence[str]
    network: str  # that saw the images
    image_size: int
    levels: Mapping[str, Grid]  # coarse to fine
    originals: np.ndarray  # (N, H, W, 3) uint8, like all images here
    reconstructions: Mapping[str, np.ndarray]  # "top/zeros", "top/mean", ..., "top+bottom/zeros" -> images
    samples: Mapping[str, np.ndarray]  # class, "" without classes -> images
    nearest: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]  # a sample; nearest by pixels; nearest by features
    distances: Mapping[str, Mapping[str, np.ndarray]]  # space -> set -> distance to the nearest training image
    counts: Mapping[str, Mapping[str, np.ndarray]]  # level -> split -> how often each entry occurs
    curves: Mapping[str, Curve]  # model -> what was measured while it learnt
    settings: Mapping[str, Any]
    digests: Mapping[str, str]


class Card(NamedTuple):
    """A number at a glance."""

    label: str
    value: str
    unit: str
    remark: str


class Table(NamedTuple):
    """Rows under a header: so many columns of words, then numbers. The first cell of a row names it."""

    caption: str
    words: int
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


class Picture(NamedTuple):
    """An image on the page: PNG in base64, and what it shows for those who cannot see it."""

    caption: str
    data: str
    described: str


def write_report(folder: Path, report: Report) -> dict[str, bytes]:
    """Write report.html, and its pictures at full size beside it; return the pictures, as PNG, by name."""
    samples = np.concatenate([_row(images) for images in report.samples.values()])
    rows = [report.originals, *report.reconstructions.values()]
    nearest = np.concatenate([np.stack([sample, *pixels, *features]) for sample, pixels, features in report.nearest])
    written = {
        "samples": contact_sheet(samples, COLUMNS),
        "reconstructions": contact_sheet(np.concatenate(rows), len(report.originals)),
        "nearest": contact_sheet(nearest, len(nearest) // len(report.nearest)),
    }
    for name, data in written.items():
        (folder / f"{name}.png").write_bytes(data)
    (folder / "report.html").write_text(render(report), encoding="utf-8")
    return written


def _row(images: np.ndarray) -> np.ndarray:
    """Fill a class's last row with paper, so that every row of the sheet is of one class."""
    missing = -len(images) % COLUMNS
    return np.concatenate([images, np.full((missing, *images.shape[1:]), PAPER, np.uint8)])


def render(report: Report) -> str:
    """Lay the page out."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        report=report,
        cards=_cards(report),
        samples=[_picture(name, images, f"samples {name}".strip()) for name, images in report.samples.items()],
        reconstructions=_reconstruction_pictures(report),
        nearest=[_nearest_pictures(number, *found) for number, found in enumerate(report.nearest, 1)],
        per_space=len(report.nearest[0][1]) if report.nearest else 0,
        tables=_tables(report),
        charts=_charts(report),
        settings=json.dumps(report.settings, indent=2, ensure_ascii=False),
    )


def _cards(report: Report) -> list[Card]:
    numbers, split = report.numbers, report.numbers["reference"]
    cards = []
    samples, kid = numbers["compared"]["samples"], f"kid_{report.network}"
    if kid in samples:
        control = numbers["compared"].get("kid_samples_to_random_codes")
        remark = f"lower is better; {control:.0%} of random codes" if control else "lower is better"
        error = f"± {samples[f'{kid}_se']:.4f}" if f"{kid}_se" in samples else ""
        cards.append(Card("KID of samples", f"{samples[kid]:.4f}", error, remark))
    found = numbers["reconstruction"][split]
    if "psnr" in found:
        cards.append(Card("Reconstruction", f"{found['psnr']:.2f}", "dB", f"{split} PSNR, higher is better"))
    for level, usage in numbers["codebook"].items():
        value = f"{usage['train']['perplexity']:.0f}"
        cards.append(Card(f"Perplexity, {level}", value, f"of {usage['entries']}", "in even use, higher is better"))
    for level, found in numbers["likelihood"].items():
        if split in found:
            remark = f"{split} NLL, lower is better; uniform {found['uniform_nats_per_code']:.2f}"
            cards.append(Card(f"Prior, {level}", f"{found[split]['nats_per_code']:.3f}", "nats/code", remark))
    total = numbers["rate"]["total"]
    best = total.get("prior", total["fixed"])
    under = "under the priors" if "prior" in total else "without priors"
    cards.append(
        Card("Rate", f"{best['bits_per_pixel']:.3f}", "bits/pixel", f"{best['compression']:.0f}x smaller, {under}")
    )
    return cards


def _tables(report: Report) -> dict[str, Table]:
    numbers = report.numbers
    return {
        "compared": _compared_table(report),
        "reconstruction": Table(
            "Pixels in [-1, 1]. MSE: lower is better. PSNR and SSIM: higher is better.",
            3,
            ["images", "levels given", "the rest", "MSE", "PSNR, dB", "SSIM"],
            [row for split in SPLITS for row in _reconstruction_rows(report, split)],
        ),
        "codebook": Table(
            "Perplexity: how many entries, evenly used, would be as unpredictable; higher is better, up to all.",
            3,
            ["level", "images", "grid", "entries", "perplexity", "used"],
            [
                [
                    level,
                    split,
                    _grid(report.levels[level]),
                    str(report.levels[level].entries),
                    _number(found, "perplexity", 1),
                    str(found["used_entries"]),
                ]
                for level, split, found in _by_split(numbers["codebook"])
            ],
        ),
        "likelihood": Table(
            "Negative log-likelihood per code; lower is better. A gap to the training images is overfitting.",
            2,
            ["level", "images", "N", "nats", "± s.e.", "bits", "uniform, nats"],
            [
                [
                    level,
                    split,
                    str(found["images"]),
                    _number(found, "nats_per_code", 4),
                    _number(found, "nats_per_code_se", 4),
                    _number(found, "bits_per_code", 4),
                    _number(numbers["likelihood"][level], "uniform_nats_per_code", 4),
                ]
                for level, split, found in _by_split(numbers["likelihood"])
            ],
        ),
        "rate": Table(
            "Compression is against 24 bits per pixel. In files: the column of that level, with all that Parquet adds.",
            2,
            ["codes", "how", "bits/pixel", "bits/dimension", "compression"],
            [
                [
                    level,
                    KINDS[kind],
                    _number(found, "bits_per_pixel", 4),
                    _number(found, "bits_per_dimension", 4),
                    _number(found, "compression", 1),
                ]
                for level in (*report.levels, "total")
                for kind, found in numbers["rate"][level].items()
            ],
        ),
        "closeness": Table(
            "Median distance to the nearest training image. Samples that are nearer than held-out images are copied.",
            2,
            ["space", "images", "median", "exact copies"],
            [
                [SPACES[space], name, f"{np.median(found):.3f}", str(int((found == 0).sum()))]
                for space, sets in report.distances.items()
                for name, found in sets.items()
            ],
        ),
    }


def _by_split(numbers: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    return ((level, split, found[split]) for level, found in numbers.items() for split in SPLITS if split in found)


SPLITS = ("train", "validation")
KINDS = {"fixed": "every entry alike", "prior": "under the prior", "files": "in files"}
SPACES = {"pixels": "pixels (RMS, 8-bit levels)", "features": "features (Euclidean)"}


def _compared_table(report: Report) -> Table:
    header = ["images", "N", *(f"{found.label} ({found.better} is better)" for found in COMPARISONS.values())]
    rows = []
    for name, label in SETS.items():
        found = report.numbers["compared"][name]
        cells = []
        for measure in COMPARISONS:
            value, error = (found.get(f"{measure}_{report.network}{suffix}") for suffix in ("", "_se"))
            cells.append("–" if value is None else f"{value:.4g}" if error is None else f"{value:.4f} ± {error:.4f}")
        rows.append([label, str(found["images"]), *cells])
    reference = report.numbers["reference"]
    return Table(f"Against as many {reference} images, by the features of {report.network}.", 1, header, rows)


def _reconstruction_rows(report: Report, split: str) -> list[list[str]]:
    found = report.numbers["reconstruction"].get(split)
    if not found:
        return []
    rows = []
    for name in report.reconstructions:
        levels, fill = name.split("/")
        part = found.get(name.replace("/", "_filled_with_"), found)
        rest = "–" if part is found else fill
        rows.append([split, levels.replace("+", ", "), rest, f"{part['mse']:.5f}"])
        rows[-1] += [_number(part, "psnr", 2), _number(part, "ssim", 3)]
    return rows


def _charts(report: Report) -> dict[str, list[tuple[str, str]]]:
    """Title and SVG of every chart, by the section it belongs to."""
    drawn: dict[str, list[tuple[str, str]]] = {"codebook": [], "rate": [], "closeness": [], "curves": []}
    for level, splits in report.counts.items():
        order = np.argsort(-splits["train"], kind="stable")
        shares = {
            split: (range(1, len(found) + 1), found[order] / found.sum() * len(found))
            for split, found in splits.items()
            if found.any()
        }
        title = f"Use of level {level}'s entries"
        svg = charts.lines(f"usage-{level}", title, shares, x="entry, by rank in training", y="use; 1 is even")
        drawn["codebook"].append((title, svg))
    points: dict[str, tuple[list[float], list[float]]] = {}
    for _, kind, bits, _, psnr in summary.rate_distortion(dict(report.numbers)):
        if psnr != "":
            xs, ys = points.setdefault(KINDS[kind], ([], []))
            xs.append(bits)
            ys.append(psnr)
    title = "Rate and distortion as levels are added"
    drawn["rate"].append((title, charts.lines("rate", title, points, x="bits per pixel", y="PSNR, dB", markers=True)))
    for space, sets in report.distances.items():
        title = f"Distance to the nearest training image, {space}"
        svg = charts.histogram(f"near-{space}", title, sets, x=SPACES[space], y="share of images")
        drawn["closeness"].append((title, svg))
    for number, (model, curve) in enumerate(report.curves.items()):
        for measure, found in _by_measure(curve).items():
            title = f"{model}: {measure.replace('_', ' ')}"
            svg = charts.lines(f"curve-{number}-{measure}", title, found, x="step", y=measure.replace("_", " "))
            drawn["curves"].append((title, svg))
    return drawn


def _by_measure(curve: Curve) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """Sort rows named "split/measure" into lines: measure -> split -> steps and values."""
    found: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for step, name, value in curve:
        split, _, measure = name.rpartition("/")
        xs, ys = found.setdefault(measure, {}).setdefault(split, ([], []))
        xs.append(step)
        ys.append(value)
    return found


def _reconstruction_pictures(report: Report) -> list[Picture]:
    split = report.numbers["reference"]
    pictures = [_picture("original", report.originals, f"{split} images as they are")]
    for name, images in report.reconstructions.items():
        levels, fill = name.split("/")
        given = levels.replace("+", ", ")
        whole = len(levels.split("+")) == len(report.levels)
        caption = f"{given}: every level" if whole else f"{given} only, the rest {FILLED[fill]}"
        pictures.append(_picture(caption, images, f"the same images decoded from {caption}"))
    return pictures


FILLED = {"zeros": "zeros", "mean": "its mean entry"}


def _nearest_pictures(number: int, sample: np.ndarray, pixels: np.ndarray, features: np.ndarray) -> list[Picture]:
    described = f"training images nearest to sample {number} by"
    return [
        _picture("", sample[None], f"sample {number}", columns=1),
        _picture("", pixels, f"{described} pixels", columns=len(pixels)),
        _picture("", features, f"{described} features", columns=len(features)),
    ]


def _picture(caption: str, images: np.ndarray, described: str, columns: int = COLUMNS) -> Picture:
    factor = -(-max(images.shape[1:3]) // LARGEST_SHOWN)
    if factor > 1:
        images = np.stack([np.asarray(Image.fromarray(image).reduce(factor)) for image in images])
    data = base64.b64encode(contact_sheet(images, min(columns, len(images)))).decode()
    return Picture(caption, data, described)


def _grid(shape: Grid) -> str:
    return f"{shape.height} x {shape.width}"


def _number(found: Mapping[str, float], name: str, digits: int) -> str:
    return f"{found[name]:.{digits}f}" if name in found else "–"
