"""Reports of the workers that write shards, and their summary: one report per shard is in memory at a time."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from stages.formats.shards import IndexRow
from stages.images.listing import SPLITS

_Hashes = np.dtype("S32")  # SHA-256, as a type that NumPy sorts


class ShardReport(NamedTuple):
    """Contents of one shard, as its worker reports them."""

    rows: list[IndexRow]  # none if all images of the shard are rejected
    rejected: list[tuple[str, str]]  # name, reason
    conversions: dict[str, int]  # description -> images
    sha256: str  # of the shard

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a report, a JSON file."""
        report = json.loads(path.read_text("utf-8"))
        rejected = [(name, reason) for name, reason in report["rejected"]]
        return cls([IndexRow(*row) for row in report["rows"]], rejected, report["conversions"], report["sha256"])


class ReportSummary:
    """Counts over the reports of all shards. It holds 32 bytes per image, and no name except of rejected ones."""

    def __init__(self, classes: Sequence[str]):
        self.rejected: list[tuple[str, str]] = []  # name, reason
        self.hashes: dict[str, str] = {}  # SHA-256 of each shard that has images, by name
        self._classes = classes
        self._image_hashes: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        self._labels: Counter[tuple[str, int]] = Counter()  # split, label
        self._conversions: Counter[str] = Counter()

    def add(self, report: ShardReport) -> None:
        """Add one report."""
        self.rejected += report.rejected
        self._conversions.update(report.conversions)
        if not report.rows:
            return
        first = report.rows[0]
        self.hashes[first.shard] = report.sha256
        self._labels.update((row.split, row.label) for row in report.rows)
        hashes = bytes.fromhex("".join(row.sha256 for row in report.rows))
        self._image_hashes[first.split].append(np.frombuffer(hashes, _Hashes))

    def counts(self, skipped: int) -> dict[str, Any]:
        """Count images per split and class, conversions, and pixel-identical images within and across splits.

        `skipped` is the number of image files that no shard was planned for.
        """
        hashes = {split: np.concatenate([np.empty(0, _Hashes), *self._image_hashes[split]]) for split in SPLITS}
        distinct = np.unique(np.concatenate(list(hashes.values())))
        return {
            "images": {split: len(hashes[split]) for split in SPLITS},
            "per_class": {
                split: {name: self._labels[split, label] for label, name in enumerate(self._classes)}
                for split in SPLITS
                if len(hashes[split]) and self._classes
            },
            "rejected": len(self.rejected),
            "skipped": skipped,
            "duplicates": sum(map(len, hashes.values())) - len(distinct),
            "leaked": int(np.isin(hashes["validation"], hashes["train"]).sum()),
            "conversions": dict(sorted(self._conversions.items())),
        }
