"""Metrics and plots files: rounded numbers, and lines per split."""

import csv
import json
from pathlib import Path

from stages.formats import curves


def rows(steps: int) -> list[dict]:
    """Return training points for each step and a validation point for each tenth."""
    train = [{"step": step, "name": f"train/{name}", "value": step / 7} for step in range(steps) for name in "ab"]
    return train + [{"step": step, "name": "validation/a", "value": 1.0} for step in range(0, steps, 10)]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_metrics_are_rounded_to_six_digits(tmp_path: Path):
    """Floats lose the digits that depend on the machine; counts and nested values stay."""
    values = {"kid": 0.13601841024263894, "images": 12345678, "nested": {"large": 1234567.89}, "list": [1 / 3]}
    curves.write_metrics(tmp_path / "metrics.json", values)
    assert json.loads((tmp_path / "metrics.json").read_text()) == {
        "kid": 0.136018,
        "images": 12345678,
        "nested": {"large": 1234570.0},
        "list": [0.333333],
    }


def test_plot_has_a_line_per_split(tmp_path: Path):
    """Training and validation are lines of their own, named after the level if there is one."""
    curves.write_curves_plot(tmp_path / "plot.csv", rows(20), {"a": "nll"}, series="top")
    points = read(tmp_path / "plot.csv")
    assert list(points[0]) == ["step", "series", "nll"]
    assert [point["step"] for point in points if point["series"] == "top, validation"] == ["0", "10"]
    assert len([point for point in points if point["series"] == "top, train"]) == 20


def test_plot_of_a_long_training_is_thinned(tmp_path: Path):
    """A line has at most MAX_POINTS points, and the last step is one of them."""
    curves.write_curves_plot(tmp_path / "plot.csv", rows(4 * curves.MAX_POINTS + 3), {"a": "mse", "b": "psnr"})
    points = [int(point["step"]) for point in read(tmp_path / "plot.csv") if point["series"] == "train"]
    assert len(points) <= curves.MAX_POINTS and points[-1] == 4 * curves.MAX_POINTS + 2
