"""Line charts and histograms as SVG for an HTML page, without scripts or requests.

Text and axes take the text colour of the page, so a chart suits its light and its dark theme.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

TEXT_PLACEHOLDER = "#010203"  # drawn as this colour, then replaced by the page's text colour
COLOURS = ("#3a86d8", "#e0732f", "#3fa66a", "#a06cd5", "#c7a008", "#d1477a")  # readable on black and on white
WIDTH_INCHES, HEIGHT_INCHES = 4.5, 2.7  # with 9-point text, readable on a phone
HISTOGRAM_BINS = 30
MAX_LEGEND_INSIDE, LEGEND_COLUMNS = 4, 3  # a longer legend would cover lines: it is drawn below the chart
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small and searchable
    "svg.hashsalt": "vqvae2",  # equal charts give equal bytes
    "font.size": 9,
    "text.parse_math": False,  # names of levels may contain $
    "text.color": TEXT_PLACEHOLDER,
    "axes.edgecolor": TEXT_PLACEHOLDER,
    "axes.labelcolor": TEXT_PLACEHOLDER,
    "xtick.color": TEXT_PLACEHOLDER,
    "ytick.color": TEXT_PLACEHOLDER,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": TEXT_PLACEHOLDER,
    "grid.alpha": 0.12,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "figure.constrained_layout.use": True,
}
Line = tuple[Sequence[float], Sequence[float]]  # x and y


def line_chart(
    chart_id: str,
    title: str,
    lines: Mapping[str, Line],
    *,
    x_label: str,
    y_label: str,
    markers: bool = False,
    log_x: bool = False,
) -> str:
    """Draw lines by name. `markers` also marks the points; a line of one point is always marked.

    `log_x` makes the x axis logarithmic; all x must then be above 0.

    `chart_id` prefixes the ids inside the SVG and must be unique on the page; `title` becomes its ARIA label.
    """

    def draw(axes: Axes) -> None:
        for colour, (name, (x, y)) in zip(_colours(len(lines)), lines.items(), strict=True):
            axes.plot(x, y, label=name, color=colour, marker="o" if markers or len(x) == 1 else None, markersize=4)
        if log_x:
            axes.set_xscale("log")
            # Plain numbers: powers of ten would need TeX, and there is often only one of them.
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_locator(NullLocator())

    return _svg(chart_id, title, draw, x_label, y_label, legend=len(lines) > 1)


def histogram(chart_id: str, title: str, values: Mapping[str, np.ndarray], *, x_label: str, y_label: str) -> str:
    """Draw the relative frequencies of values (N,) by name, over common bins from 0. Ids as in `line_chart`."""
    largest = float(np.concatenate(list(values.values())).max())
    edges = np.linspace(0, max(largest, 1e-9), HISTOGRAM_BINS + 1).tolist()  # bins of no width would be an error

    def draw(axes: Axes) -> None:
        for colour, (name, data) in zip(_colours(len(values)), values.items(), strict=True):
            weights = np.full(len(data), 1 / len(data))
            axes.hist(data, edges, weights=weights, label=name, color=colour, alpha=0.45)
            axes.hist(data, edges, weights=weights, color=colour, histtype="step")

    return _svg(chart_id, title, draw, x_label, y_label, legend=len(values) > 1)


def _colours(count: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]


def _svg(chart_id: str, title: str, draw: Callable[[Axes], None], x_label: str, y_label: str, *, legend: bool) -> str:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES))
        axes = figure.subplots()
        draw(axes)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if legend and len(axes.get_legend_handles_labels()[1]) > MAX_LEGEND_INSIDE:
            figure.legend(loc="outside lower center", ncols=LEGEND_COLUMNS)
        elif legend:
            axes.legend()
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # a date would change the bytes
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    document = buffer.getvalue()
    view_box = re.search(r'viewBox="[^"]*"', document)
    assert view_box is not None
    body = document[document.index(">", view_box.end()) + 1 :]
    # Ids must be unique on the page: prefix their definitions and references.
    prefix = re.sub(r"[^a-zA-Z0-9]+", "-", chart_id)
    body = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{prefix}-", body).replace(TEXT_PLACEHOLDER, "currentColor")
    return f'<svg {view_box[0]} role="img" aria-label="{escape(title)}">{body}'
