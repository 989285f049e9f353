"""Fixtures of the pipeline that runs in this process."""

import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.mini_pipeline import MiniPipeline, without_ray


@pytest.fixture
def in_process(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run stages without Ray, unless the test has the marker `ray`."""
    with nullcontext() if request.node.get_closest_marker("ray") else without_ray():
        yield


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The node's cache folder, which does not exist yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def project(finished_pipeline: MiniPipeline, tmp_path_factory: pytest.TempPathFactory) -> MiniPipeline:
    """A copy of the finished pipeline, to which tests may add results. They must not change those that it has."""
    folder = tmp_path_factory.mktemp("project")
    return MiniPipeline(shutil.copytree(finished_pipeline.folder, folder, dirs_exist_ok=True))
