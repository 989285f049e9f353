"""HTML page of `vqvae2 compare`. The page is one file: pictures are embedded, and nothing is requested."""

import base64
import io
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from pipeline.compared_runs import PICTURES
from pipeline.comparison import Comparison
from pipeline.text import format_value
from stages.formats import html_page

TEMPLATE = Path(__file__).with_name("compare_page.html.j2")

MAX_WIDTH = 1600  # pixels of an embedded picture; larger ones are reduced


class Cell(NamedTuple):
    """A picture of one run; `data` is "" if the run has none."""

    name: str
    alt_text: str
    data: str  # base64 PNG


def render(comparison: Comparison) -> str:
    """Render the page as HTML."""
    runs = (comparison.a, comparison.b)
    pictures = [
        (name, [Cell(run.name, f"{name} of {run.name}", _embed(run.pictures.get(name, b""))) for run in runs])
        for name in PICTURES
        if any(name in run.pictures for run in runs)
    ]
    return html_page.render(
        TEMPLATE,
        runs=list(zip("AB", runs, strict=True)),
        settings_available=bool(comparison.a.settings and comparison.b.settings),
        settings=[(key, _format(before), _format(after)) for key, before, after in comparison.settings],
        differing=comparison.differing,
        equal=comparison.equal,
        others=[number for number in comparison.numbers if number.difference is None],
        pictures=pictures,
        notes=comparison.notes,
    )


def _format(value: object) -> str:
    return "-" if value is None else format_value(value)


def _embed(png: bytes) -> str:
    if not png:
        return ""
    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        if (factor := -(-image.width // MAX_WIDTH)) > 1:  # rounded up
            buffer = io.BytesIO()
            image.convert("RGB").reduce(factor).save(buffer, "PNG", optimize=True)
            png = buffer.getvalue()
    return base64.b64encode(png).decode()
