"""Settings of where a stage runs, never of what it computes. The settings reference has the comments of the fields."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from models.config import check_field, check_not_negative, check_positive


@dataclass(frozen=True)
class StageClusterConfig:
    """Overrides of `ClusterConfig` for one stage; null keeps the value of `cluster`."""

    workers: int | tuple[int, int] | None = None  # as cluster.workers
    cpus_per_worker: float | None = None  # as cluster.cpus_per_worker
    gpus_per_worker: float | None = None  # as cluster.gpus_per_worker
    loader_workers: int | None = None  # as cluster.loader_workers
    max_failures: int | None = None  # as cluster.max_failures
    storage: str | None = None  # as cluster.storage
    checkpoint_every_minutes: float | None = None  # as cluster.checkpoint_every_minutes

    def __post_init__(self) -> None:
        ClusterConfig(**self.overrides())  # created only to check the values

    def overrides(self) -> dict[str, Any]:
        """Return the settings that are not null."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class ClusterConfig:
    """Resources of a stage. Changing them reruns no stage."""

    # worker processes (ranks of training, actors of other stages), 1 or more; or [min, max]: as many as fit, so
    # training continues with fewer after the loss of a node, and with more when nodes join
    workers: int | tuple[int, int] = 1
    cpus_per_worker: float = 2  # CPUs that Ray reserves per worker, above 0
    gpus_per_worker: float = 0  # GPUs that Ray reserves per worker, 0 or more
    loader_workers: int = 0  # DataLoader processes per training worker, 0 or more; 0 loads in the worker itself
    max_failures: int = 2  # restarts of a failed worker group before the stage fails, 0 or more
    # URL for nodes without a shared disk, such as s3://bucket/prefix; empty: the nodes share the project's folder
    storage: str = ""
    # minutes between checkpoints by time, besides those of checkpoint_every of a training, 0 or more; 0 saves none
    checkpoint_every_minutes: float = 0
    # these settings for single stages, such as {shard: {workers: 9}}; those of prior_top override those of prior
    stages: Mapping[str, StageClusterConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.workers, int):
            check_positive(self, "workers")
        elif not 1 <= self.workers[0] <= self.workers[1]:
            raise ValueError(f"workers must be a pair [min, max] with 1 <= min <= max, got {list(self.workers)}")
        else:
            # Ray rounds the number of workers with fractions down in another way, and could wait forever for the last.
            for name in ("cpus_per_worker", "gpus_per_worker"):
                value = getattr(self, name)
                check_field(self, name, float(value).is_integer(), "a whole number if workers is a pair")
        check_field(
            self,
            "storage",
            not self.storage or "://" in self.storage,
            "a URL such as s3://bucket/prefix, or '' if all nodes share the project's folder",
        )
        check_field(self, "cpus_per_worker", self.cpus_per_worker > 0, "above 0")
        check_not_negative(self, "gpus_per_worker", "loader_workers", "max_failures", "checkpoint_every_minutes")

    @property
    def min_workers(self) -> int:
        """Fewest workers with which a stage runs."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        """Largest number of workers of a stage."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    def clamp_workers(self, capacity: int) -> int:
        """Clamp a number of workers to the range. The result does not fit if `capacity` is below `min_workers`."""
        return max(self.min_workers, min(self.max_workers, capacity))

    def for_stage(self, stage: str) -> "ClusterConfig":
        """Return the settings of a stage by its name in commands, such as vqvae or prior_top, without `stages`."""
        settings: dict[str, Any] = {"stages": {}}
        # first the settings of all priors, then those of this level
        for name in (stage.partition("_")[0], stage):
            settings |= self.stages[name].overrides() if name in self.stages else {}
        return replace(self, **settings)

    def variants(self) -> list["ClusterConfig"]:
        """Return the settings without overrides, and those of each stage in `stages`."""
        return [replace(self, stages={}), *map(self.for_stage, self.stages)]
