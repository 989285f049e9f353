"""Charts of the report: codebook usage, rate-distortion, distances to training images, and training curves.

To add a chart to a section, write its function and a line of `charts`; report.html.j2 has the sections. New data is a
field of `ReportData`, filled in results.py. The charts of `dvc plots show` are in stages/formats/curves.py.

Axes: N images, K codebook entries.
"""

import numpy as np

from stages.evaluation import svg
from stages.evaluation.report_data import Curve, ReportData
from stages.evaluation.tables import RATE_LABELS, SPLIT_LABELS, space_label
from stages.formats.curves import curve_points

RATE_CHARTS = {"psnr": "PSNR, dB", "ssim": "SSIM", "stlpips": "ST-LPIPS (lower is better)"}  # metrics of distortion
OPTIONAL_CHARTS = {"stlpips"}  # drawn if it was measured
Chart = tuple[str, str]  # title and SVG
SAME_AS_ANOTHER = {"mse", "nll_bits_per_code"}  # metrics in other units than PSNR and nats, with the same curve
LINE_LABELS = {**SPLIT_LABELS, "seen": "training, not augmented"}
CURVE_LABELS = {"psnr": "PSNR, dB", "nll_nats_per_code": "NLL, nats per code", "commitment": "commitment loss"}


def charts(data: ReportData) -> dict[str, list[Chart]]:
    """Draw all charts, by section of the page."""
    return {
        "codebook": _usage_charts(data),
        "rate": [
            _rate_distortion_chart(data, metric, label)
            for metric, label in RATE_CHARTS.items()
            if metric not in OPTIONAL_CHARTS or any(metric in row for row in data.metrics["rate_distortion"])
        ],
        "memorization": _distance_charts(data),
        "curves": _training_charts(data),
    }


def _usage_charts(data: ReportData) -> list[Chart]:
    charts = []
    for level, by_split in data.entry_counts.items():
        order = np.argsort(-by_split["train"], kind="stable")  # most used entry first
        usage = {
            # Relative to uniform usage, 1 / K.
            label: (range(1, len(by_split[split]) + 1), by_split[split][order] / by_split[split].mean())
            for split, label in SPLIT_LABELS.items()
            if split in by_split and by_split[split].any()
        }
        title = f"Codebook usage of level {level}"
        svg_text = svg.line_chart(
            f"usage-{level}", title, usage, x_label="entry, by rank in training", y_label="usage relative to uniform"
        )
        charts.append((title, svg_text))
    return charts


def _rate_distortion_chart(data: ReportData, metric: str, label: str) -> Chart:
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for row in data.metrics["rate_distortion"]:
        if metric in row and row["bits_per_pixel"] > 0:  # equal images have no PSNR
            x, y = lines.setdefault(RATE_LABELS[row["rate"]], ([], []))
            x.append(row["bits_per_pixel"])
            y.append(row[metric])
    title = f"Rate and {label}, from the first level to all levels; other levels are zeros"
    svg_text = svg.line_chart(
        f"rate-{metric}", title, lines, x_label="bits per pixel", y_label=label, markers=True, log_x=True
    )
    return title, svg_text


def _distance_charts(data: ReportData) -> list[Chart]:
    charts = []
    for space, by_set in data.nearest_distances.items():
        title = f"Distance to the nearest training image, {space}"
        svg_text = svg.histogram(f"near-{space}", title, by_set, x_label=space_label(space), y_label="share of images")
        charts.append((title, svg_text))
    return charts


def _training_charts(data: ReportData) -> list[Chart]:
    charts = []
    for index, (model, curve) in enumerate(data.curves.items()):
        for metric, lines in _lines_by_metric(curve).items():
            if metric in SAME_AS_ANOTHER:
                continue
            label = CURVE_LABELS.get(metric, metric.replace("_", " "))
            title = f"{model}: {label}"
            svg_text = svg.line_chart(f"curve-{index}-{metric}", title, lines, x_label="step", y_label=label)
            charts.append((title, svg_text))
    return charts


def _lines_by_metric(curve: Curve) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """Group points named "split/metric": metric -> split -> steps and values, thinned to MAX_POINTS."""
    metrics = dict.fromkeys(name.partition("/")[2] for _, name, _ in curve)
    rows = [{"step": step, "name": name, "value": value} for step, name, value in curve]
    lines: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for metric in metrics:
        points = curve_points(rows, [metric])
        for split, label in LINE_LABELS.items():
            of_split = [(step, value) for step, name, value in points if name == split]
            if of_split:
                lines.setdefault(metric, {})[label] = ([step for step, _ in of_split], [value for _, value in of_split])
    return lines
