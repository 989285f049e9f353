"""Stage context: settings and services of one execution of a stage.

A stage gets a `StageContext` and reports through its `Reporter`, so it knows nothing of MLflow, the terminal or other
stages.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from stages.cluster_config import ClusterConfig
from stages.runtime.storage import Storage


def work_folder_name(fingerprint: str) -> str:
    """Return the name of the work folder of a fingerprint: its first digits."""
    return fingerprint[:16]


class Reporter:
    """Receives progress, metrics, images and messages of a run.

    Every method may be called at any time and returns at once. The methods of this class do nothing, which suits unit
    tests.
    """

    def progress(self, done: float, total: float, unit: str, numbers: Mapping[str, float]) -> None:
        """Report that `done` of `total` units are finished, with a few `numbers` to show beside the bar."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Report values at a step, to be drawn as curves."""

    def image(self, name: str, png: bytes, step: int) -> None:
        """Report a PNG image at a step."""

    def message(self, text: str) -> None:
        """Report one line of text for the user."""


@dataclass(frozen=True)
class StageContext:
    """Identity, work folder, cluster and reporter of one execution of a stage."""

    stage: str  # name in dvc.yaml, such as "vqvae" or "prior@top"
    fingerprint: str  # hash of the settings, inputs and result version: equal fingerprints give equal artifacts
    work_dir: Path  # resumable state of this fingerprint only, outside the outputs, which DVC deletes before a run
    cluster: ClusterConfig
    reporter: Reporter = field(default_factory=Reporter)
    flops_per_image: float = 0.0  # operations of a forward pass of the network that the stage trains, for the metrics

    @property
    def storage(self) -> Storage | None:
        """Storage folder of this run for nodes without a shared disk; None if all nodes see the same `work_dir`."""
        url = self.cluster.storage
        return Storage(url).child("runs", self.stage, work_folder_name(self.fingerprint)) if url else None
