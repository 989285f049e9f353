"""Fixture of a finished small pipeline for the commands that use trained models."""

from collections.abc import Iterator
from contextlib import chdir

import pytest

from tests.mini_pipeline import MiniPipeline


@pytest.fixture
def artifacts(finished_pipeline: MiniPipeline) -> Iterator[MiniPipeline]:
    """The finished pipeline, as the current folder."""
    with chdir(finished_pipeline.folder):
        yield finished_pipeline
