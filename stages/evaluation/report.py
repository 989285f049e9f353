"""Report page: key metrics and images first, then tables and charts, then the artifacts and settings they come from.

The page is one HTML file that requests nothing from the network: images and charts are embedded. It loads one local
script if that exists, the facts of the run that computed it (stages/tracking/provenance.py).

Axes: N images, H rows, W columns, k nearest images.
"""

import base64
import hashlib
import json
from pathlib import Path

import numpy as np

from stages.evaluation import ladder
from stages.evaluation.charts import charts
from stages.evaluation.pictures import COLUMNS, Picture, codebook_picture, picture, picture_list
from stages.evaluation.report_data import NearestImages, ReportData
from stages.evaluation.tables import SPLIT_LABELS, cards, space_name, tables
from stages.formats import html_page
from stages.images.contact_sheet import BACKGROUND, contact_sheet

FILL_LABELS = {
    "zeros": "zeros",
    "mean": "their mean entry",
    "prior": "drawn from their priors at temperature 1",
    "mode": "the most probable code of their priors at each position",
}
SAMPLES_SHOWN = 64  # without classes
SAMPLES_SHOWN_PER_CLASS, CLASSES_SHOWN = 8, 16
FOLDER = Path(__file__).parent
TEMPLATE, SCRIPT = "report.html.j2", "report.js"


def write_report(folder: Path, data: ReportData) -> dict[str, bytes]:
    """Write report.html and its contact sheets at full size; return the contact sheets as PNG, by name."""
    samples = np.concatenate([_pad_row(images) for images in _first_samples(data).values()])
    reconstructions = np.concatenate([data.originals, *data.reconstructions.values()])
    nearest = np.concatenate(
        [np.stack([row.sample, *np.concatenate([*row.by_space.values()])]) for row in data.nearest]
    )
    sheets = {
        "samples": contact_sheet(samples, COLUMNS),
        "reconstructions": contact_sheet(reconstructions, len(data.originals)),
        "nearest": contact_sheet(nearest, len(nearest) // len(data.nearest)),
    }
    for name, png in sheets.items():
        (folder / f"{name}.png").write_bytes(png)
    (folder / "report.html").write_text(render(data), encoding="utf-8")
    return sheets


def render(data: ReportData) -> str:
    """Render the page as HTML."""
    script = (FOLDER / SCRIPT).read_text(encoding="utf-8")
    shown = _first_samples(data)
    return html_page.render(
        FOLDER / TEMPLATE,
        data=data,
        cards=cards(data),
        reference=SPLIT_LABELS[data.metrics["reference"]],
        samples=[picture(name, images, f"samples {name}".strip()) for name, images in shown.items()],
        shows_all=all(len(images) == count for images, count in data.samples.values()),
        all_samples=_all_samples(data) if sum(map(len, shown.values())) < data.metrics["num_images"]["samples"] else [],
        reconstructions=_reconstruction_pictures(data),
        rungs=[
            picture(ladder.labels(data.levels)[name], images, f"images of the rung {name}")
            for name, images in data.rungs.items()
        ],
        ladder_advice=ladder.advice(data.metrics["ladder"]["steps"]) if data.rungs else "",
        nearest=[_nearest_pictures(number, row) for number, row in enumerate(data.nearest, 1)],
        nearest_count=len(data.nearest[0].by_space["pixels"]) if data.nearest else 0,
        nearest_spaces=[space_name(space) for space in data.nearest[0].by_space] if data.nearest else [],
        codebooks=[
            codebook_picture(level, images, int((data.entry_counts[level]["train"] > 0).sum()))
            for level, images in data.codebooks.items()
        ],
        tables=tables(data),
        charts=charts(data),
        settings=json.dumps(data.settings, indent=2, ensure_ascii=False),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _first_samples(data: ReportData) -> dict[str, np.ndarray]:
    """Select the samples that are shown at once: class -> images."""
    per_class = SAMPLES_SHOWN_PER_CLASS if len(data.samples) > 1 else SAMPLES_SHOWN
    return {name: samples.images[:per_class] for name, samples in list(data.samples.items())[:CLASSES_SHOWN]}


def _all_samples(data: ReportData) -> list[Picture]:
    pictures = []
    for name, (images, count) in data.samples.items():
        shown = f"the first {len(images)} of {count:,}" if len(images) < count else str(count)
        caption = f"{name}: {shown}" if name else f"{shown} samples"
        pictures.append(picture_list(caption, images, f"all shown samples {name}".strip()))
    return pictures


def _pad_row(images: np.ndarray) -> np.ndarray:
    """Fill the last row of a class with blank images, so that the next class begins a row."""
    missing = -len(images) % COLUMNS
    return np.concatenate([images, np.full((missing, *images.shape[1:]), BACKGROUND, np.uint8)])


def _reconstruction_pictures(data: ReportData) -> list[Picture]:
    pictures = [picture("originals", data.originals, f"original {data.metrics['reference']} images")]
    for name, images in data.reconstructions.items():
        prefix, fill = name.split("/")
        levels = prefix.split("+")
        all_levels = len(levels) == len(data.levels)
        caption = f"{', '.join(levels)}: " + ("all levels" if all_levels else f"other levels are {FILL_LABELS[fill]}")
        pictures.append(picture(caption, images, f"the same images decoded from {caption}"))
    return pictures


def _nearest_pictures(number: int, row: NearestImages) -> list[Picture]:
    alt_text = f"training images nearest to sample {number} by"
    nearest = [
        picture("", images, f"{alt_text} {space_name(space)}", columns=len(images))
        for space, images in row.by_space.items()
    ]
    return [picture("", row.sample[None], f"sample {number}", columns=1), *nearest]
