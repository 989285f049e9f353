"""Training curves: rows of step, metric name and value; and the metrics and plots files of DVC."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[Mapping[str, Any]]  # keys: step; name, "SPLIT/METRIC" such as "validation/mse"; value
FILE = "curves.csv"  # in a model folder


def write_metrics(path: Path, values: Mapping[str, Any]) -> None:
    """Write metrics as JSON for `dvc metrics show`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def write(path: Path, rows: Rows) -> None:
    """Write rows as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["step", "name", "value"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


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


def write_plot(path: Path, rows: Rows) -> None:
    """Write curves as CSV for `dvc plots`: one line per step and split, one column per metric."""
    lines: dict[tuple[int, str], dict[str, Any]] = {}
    for row in rows:
        split, _, name = row["name"].partition("/")
        lines.setdefault((row["step"], split), {"step": row["step"], "split": split})[name] = row["value"]
    columns = list(dict.fromkeys(column for line in lines.values() for column in line))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines.values())
