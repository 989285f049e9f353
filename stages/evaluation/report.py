"""Report page: images first, then metrics, then the artifacts and settings they come from.

The page is one self-contained HTML file: images and charts are embedded, and nothing is requested.

Axes: N images, H rows, W columns, k nearest images.
"""

import base64
import json
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
from PIL import Image

from stages.evaluation.charts import charts
from stages.evaluation.report_data import NearestImages, ReportData
from stages.evaluation.tables import cards, tables
from stages.images.contact_sheet import BACKGROUND, contact_sheet

MAX_EMBEDDED_SIDE = 96  # pixels; larger images are reduced on the page and kept at full size in the PNG files
COLUMNS = 8  # of a contact sheet
FILL_LABELS = {"zeros": "zeros", "mean": "their mean entry"}


class Picture(NamedTuple):
    """An embedded image."""

    caption: str
    base64_png: str
    alt_text: str


def write_report(folder: Path, data: ReportData) -> dict[str, bytes]:
    """Write report.html and its contact sheets at full size; return the contact sheets as PNG, by name."""
    samples = np.concatenate([_pad_row(images) for images in data.samples.values()])
    reconstructions = np.concatenate([data.originals, *data.reconstructions.values()])
    nearest = np.concatenate([np.stack([row.sample, *row.by_pixels, *row.by_features]) for row in data.nearest])
    sheets = {
        "samples": contact_sheet(samples, COLUMNS),
        "reconstructions": contact_sheet(reconstructions, len(data.originals)),
        "nearest": contact_sheet(nearest, len(nearest) // len(data.nearest)),
    }
    for name, png in sheets.items():
        (folder / f"{name}.png").write_bytes(png)
    (folder / "report.html").write_text(render(data), encoding="utf-8")
    return sheets


def _pad_row(images: np.ndarray) -> np.ndarray:
    """Fill the last row of a class with blank images, so that the next class begins a row."""
    missing = -len(images) % COLUMNS
    return np.concatenate([images, np.full((missing, *images.shape[1:]), BACKGROUND, np.uint8)])


def render(data: ReportData) -> str:
    """Render the page as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        data=data,
        cards=cards(data),
        samples=[_picture(name, images, f"samples {name}".strip()) for name, images in data.samples.items()],
        reconstructions=_reconstruction_pictures(data),
        nearest=[_nearest_pictures(number, row) for number, row in enumerate(data.nearest, 1)],
        nearest_count=len(data.nearest[0].by_pixels) if data.nearest else 0,
        tables=tables(data),
        charts=charts(data),
        settings=json.dumps(data.settings, indent=2, ensure_ascii=False),
    )


def _reconstruction_pictures(data: ReportData) -> list[Picture]:
    pictures = [_picture("originals", data.originals, f"original {data.metrics['reference']} images")]
    for name, images in data.reconstructions.items():
        prefix, fill = name.split("/")
        levels = prefix.split("+")
        all_levels = len(levels) == len(data.levels)
        caption = f"{', '.join(levels)}: " + ("all levels" if all_levels else f"other levels are {FILL_LABELS[fill]}")
        pictures.append(_picture(caption, images, f"the same images decoded from {caption}"))
    return pictures


def _nearest_pictures(number: int, row: NearestImages) -> list[Picture]:
    alt_text = f"training images nearest to sample {number} by"
    return [
        _picture("", row.sample[None], f"sample {number}", columns=1),
        _picture("", row.by_pixels, f"{alt_text} pixels", columns=len(row.by_pixels)),
        _picture("", row.by_features, f"{alt_text} features", columns=len(row.by_features)),
    ]


def _picture(caption: str, images: np.ndarray, alt_text: str, columns: int = COLUMNS) -> Picture:
    """Embed images (N, H, W, 3) as one contact sheet, reduced to MAX_EMBEDDED_SIDE."""
    factor = -(-max(images.shape[1:3]) // MAX_EMBEDDED_SIDE)  # rounded up
    if factor > 1:
        images = np.stack([np.asarray(Image.fromarray(image).reduce(factor)) for image in images])
    png = contact_sheet(images, min(columns, len(images)))
    return Picture(caption, base64.b64encode(png).decode(), alt_text)
