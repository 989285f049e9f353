"""One Ray cluster for each file of tests."""

from collections.abc import Iterator

import pytest

from stages.config import ClusterConfig
from stages.runtime.cluster import connect_cluster
from stages.runtime.context import StageContext


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StageContext]:
    """Context on a private cluster with two workers."""
    config = ClusterConfig(workers=2, cpus_per_worker=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))  # the workers inherit it
        with connect_cluster(config):
            yield StageContext("codes", "f", tmp_path_factory.mktemp("work"), config)
