"""Fixture of stages that map parts."""

import pytest

from stages.config import ClusterConfig
from stages.runtime.context import StageContext


@pytest.fixture(scope="module")
def context(cluster: ClusterConfig, tmp_path_factory: pytest.TempPathFactory) -> StageContext:
    """Context of a stage on the cluster."""
    return StageContext("codes", "f", tmp_path_factory.mktemp("work"), cluster)
