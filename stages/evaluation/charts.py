"""Charts as SVG inside a page: no script, no request, and the page's own text colour, be it dark or light."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

TEXT = "#010203"  # stands for the page's text colour, which replaces it
COLOURS = ("#3a86d8", "#e0732f", "#3fa66a", "#a06cd5", "#c7a008", "#d1477a")  # readable on black and on white
WIDTH, HEIGHT = 4.5, 2.7  # inches: at 9 points, text stays readable on a phone
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, and found by a search
    "svg.hashsalt": "vqvae2",  # equal charts are equal bytes
    "font.size": 9,
    "text.parse_math": False,  # a level may be called anything
    "text.color": TEXT,
    "axes.edgecolor": TEXT,
    "axes.labelcolor": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": TEXT,
    "grid.alpha": 0.12,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "figure.constrained_layout.use": True,
}
Line = tuple[Sequence[float], Sequence[float]]  # x and y


def lines(
    name: str,
    described: str,
    found: Mapping[str, Line],
    *,
    x: str,
    y: str,
    markers: bool = False,
    log: bool = False,
) -> str:
    """Draw named lines, or points joined by lines."""

    def draw(axes: Axes) -> None:
        for colour, (label, (xs, ys)) in zip(_colours(len(found)), found.items(), strict=True):
            alone = markers or len(xs) == 1
            axes.plot(xs, ys, label=label, color=colour, marker="o" if alone else None, markersize=4)
        if log:
            axes.set_yscale("log")

    return _svg(name, described, draw, x, y, legend=len(found) > 1)


def histogram(name: str, described: str, found: Mapping[str, np.ndarray], *, x: str, y: str) -> str:
    """Draw how named values spread, over common bins."""
    everything = np.concatenate(list(found.values()))
    edges = np.linspace(0, max(float(everything.max()), 1e-9), 31).tolist()

    def draw(axes: Axes) -> None:
        for colour, (label, values) in zip(_colours(len(found)), found.items(), strict=True):
            weights = np.full(len(values), 1 / len(values))
            axes.hist(values, edges, weights=weights, label=label, color=colour, alpha=0.45)
            axes.hist(values, edges, weights=weights, color=colour, histtype="step")

    return _svg(name, described, draw, x, y, legend=len(found) > 1)


def _colours(count: int) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(count)]


def _svg(name: str, described: str, draw: Callable[[Axes], None], x: str, y: str, *, legend: bool) -> str:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT))
        axes = figure.subplots()
        draw(axes)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        if legend:
            axes.legend()
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    drawn = buffer.getvalue()
    size = re.search(r'viewBox="[^"]*"', drawn)
    assert size is not None
    body = drawn[drawn.index(">", size.end()) + 1 :]
    # Ids are one page's, not one chart's.
    body = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{re.sub(r'[^a-zA-Z0-9]+', '-', name)}-", body)
    return f'<svg {size[0]} role="img" aria-label="{escape(described)}">{body.replace(TEXT, "currentColor")}'
