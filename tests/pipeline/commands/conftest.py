"""Fixture of a finished small pipeline for the commands that use trained models."""

from collections.abc import Iterator
from contextlib import chdir

import pytest

from tests.mini_pipeline import MiniPipeline, without_ray


@pytest.fixture(scope="session")
def finished_pipeline(tmp_path_factory: pytest.TempPathFactory) -> MiniPipeline:
    """The artifacts of a small pipeline, built once per session."""
    with without_ray():
        return MiniPipeline.build(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def artifacts(finished_pipeline: MiniPipeline) -> Iterator[MiniPipeline]:
    """The finished pipeline, as the current folder."""
    with chdir(finished_pipeline.folder):
        yield finished_pipeline
