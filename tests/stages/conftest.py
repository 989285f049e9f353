"""Fixtures of the pipeline that runs in this process."""

from collections.abc import Iterator

import pytest

from tests.mini_pipeline import MiniPipeline, without_ray


@pytest.fixture
def in_process() -> Iterator[None]:
    """Run stages without Ray."""
    with without_ray():
        yield


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> MiniPipeline:
    """Artifacts of every stage up to samples. Tests must not change them."""
    with without_ray():
        return MiniPipeline.build(tmp_path_factory.mktemp("project"))
