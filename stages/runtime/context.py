"""One stage executed once: where it keeps its state, what it reports, and to whom.

A stage receives a `Run` and knows nothing of MLflow, terminals or other stages. `Reporter` is what stands behind
it; the base class keeps silent, which is what unit tests use.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from stages.config import ClusterConfig
from stages.runtime.storage import Storage


class Reporter:
    """Who hears of a run. Every method may be called at any time and returns at once."""

    def progress(self, done: float, total: float, unit: str, numbers: Mapping[str, float]) -> None:
        """`done` of `total` units are finished; `numbers` are worth a glance beside the bar."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Values at a step, to be drawn as curves."""

    def picture(self, name: str, png: bytes, step: int) -> None:
        """A picture at a step."""

    def note(self, text: str) -> None:
        """One line the user should see."""


@dataclass(frozen=True)
class StageContext:
    """What a stage needs besides its inputs and settings."""

    stage: str  # as in dvc.yaml, such as "vqvae" or "prior@top"
    fingerprint: str  # of the settings, the inputs' digests and the code: equal fingerprints make equal artifacts
    work: Path  # resumable state, outside of what DVC deletes; holds nothing of another fingerprint
    cluster: ClusterConfig
    reporter: Reporter = field(default_factory=Reporter)

    @property
    def storage(self) -> Storage | None:
        """Where the nodes meet for this run; None if `work` is the same folder for all of them."""
        url = self.cluster.storage
        return Storage(url).under("runs", self.stage, self.fingerprint[:16]) if url else None
