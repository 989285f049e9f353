"""CSV files that `dvc plots show` draws: rate-distortion, likelihood and codebook usage.

A template in .dvc/plots draws one line per value of the column `series`, or one bar per row.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from stages.evaluation.summary import Metrics
from stages.evaluation.tables import RATE_LABELS
from stages.formats.curves import MAX_POINTS, write_plot


def write_plots(folder: Path, metrics: Metrics, counts: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Write one CSV file per plot. `counts` are the occurrences of entries, (K,): level -> split."""
    write_plot(
        folder / "rate_distortion.csv",
        ["series", "levels", "bits_per_pixel", "mse", "psnr"],
        (
            [RATE_LABELS[row["rate"]], row["point"], row["bits_per_pixel"], row["mse"], row.get("psnr", "")]
            for row in metrics["rate_distortion"]
        ),
    )
    write_plot(
        folder / "nll.csv",
        ["level", "series", "nll"],
        [
            [level, split, by_split[split]["nats_per_code"]]
            for level, by_split in metrics["likelihood"].items()
            for split in ("validation", "train")
            if split in by_split
        ],
    )
    usage = []
    for level, by_split in counts.items():
        order = np.argsort(-by_split["train"], kind="stable")  # most used entry first
        every = -(-len(order) // MAX_POINTS)  # rounded up
        for split, split_counts in by_split.items():
            shares = split_counts[order] / max(1, split_counts.sum()) * len(order)  # 1: an even share
            usage += [[rank, f"{level}, {split}", share] for rank, share in enumerate(shares.tolist(), 1)][::every]
    write_plot(folder / "codebook_usage.csv", ["rank", "series", "usage"], usage)
