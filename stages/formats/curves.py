"""Training curves: rows of step, metric name and value; and the metrics and plots files of DVC.

Metrics and plots are rounded to SIGNIFICANT_DIGITS: later digits depend on the processor, and mean nothing.
"""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[Mapping[str, Any]]  # keys: step; name, "SPLIT/METRIC" such as "validation/mse"; value
FILE = "curves.csv"  # in a model folder
SIGNIFICANT_DIGITS = 6
MAX_POINTS = 1000  # of a line in a plots file, which becomes part of a page


def write_metrics(path: Path, values: Mapping[str, Any]) -> None:
    """Write rounded metrics as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(round_numbers(values), indent=2) + "\n", encoding="utf-8")


def round_numbers(value: Any) -> Any:
    """Round the floats in nested mappings and sequences to SIGNIFICANT_DIGITS."""
    if isinstance(value, Mapping):
        return {key: round_numbers(nested) for key, nested in value.items()}
    if isinstance(value, list | tuple):
        return [round_numbers(nested) for nested in value]
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}") if isinstance(value, float) else value


def write(path: Path, rows: Rows) -> None:
    """Write rows as CSV."""
    _write_csv(path, ["step", "name", "value"], ([row["step"], row["name"], row["value"]] for row in rows))


def read(path: Path) -> list[tuple[int, str, float]]:
    """Read steps, names and values; an empty list if there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [(int(row["step"]), row["name"], float(row["value"])) for row in csv.DictReader(file)]


def last(rows: Rows) -> dict[str, dict[str, float]]:
    """Return the last value of each metric: split -> metric -> value."""
    values: dict[str, dict[str, float]] = {}
    for row in rows:
        split, _, name = row["name"].partition("/")
        values.setdefault(split, {})[name] = row["value"]
    return values


def write_plot(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write rounded rows as CSV for `dvc plots`. A template in .dvc/plots draws one line per value of `series`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_csv(path, header, (round_numbers(row) for row in rows))


def write_curves_plot(path: Path, rows: Rows, columns: Mapping[str, str], series: str = "") -> None:
    """Write some metrics as CSV for `dvc plots`, with one line per split.

    `columns` maps metrics to columns. `series` precedes the split in the names of the lines. Of more than MAX_POINTS
    steps of a split, evenly spaced ones are written.
    """
    write_plot(path, ["step", "series", *columns.values()], curve_points(rows, columns, series))


def curve_points(rows: Rows, metrics: Iterable[str], series: str = "") -> list[list[Any]]:
    """Return step, name of the line, and the values of some metrics, for the steps of each split."""
    by_split: dict[str, dict[int, dict[str, float]]] = {}
    for row in rows:
        split, _, name = row["name"].partition("/")
        by_split.setdefault(split, {}).setdefault(row["step"], {})[name] = row["value"]
    metrics = list(metrics)
    points = []
    for split, by_step in by_split.items():
        line = f"{series}, {split}" if series else split
        selected = [values for values in by_step.items() if all(metric in values[1] for metric in metrics)]
        every = -(-len(selected) // MAX_POINTS) or 1  # rounded up
        thinned = selected[::-1][::every][::-1]  # the last step is always one of them
        points += [[step, line, *(values[metric] for metric in metrics)] for step, values in thinned]
    return points


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
