"""One real run of the smallest pipeline, made once; every test here starts from a copy of it."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # for projects.py: the folders of tests are no packages

from projects import SMOKE, Done, Namespace, Project, namespaces_refused


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.ray)


# A container: nobody's home, no locale, no terminal to speak of, and a way to the outside that leads nowhere.
BARE = {"HOME": "/proc/nobody", "LC_ALL": "C", "TERM": "dumb", "COLUMNS": "40"}
BARE |= dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")


@pytest.fixture(scope="session")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Done]:
    """The project after `vqvae2 run -S experiment=smoke`, and what that printed. To be read only."""
    folder = tmp_path_factory.mktemp("first")
    project = Project.of_working_tree(folder / "a baker's prøject")  # as folders of people are named
    project.environment["DVC_SITE_CACHE_DIR"] = str(folder / "dvc")
    return project, Project(project.folder, project.environment | BARE).run(*SMOKE)


@pytest.fixture
def project(first_run: tuple[Project, Done], tmp_path: Path) -> Project:
    """A copy of the finished project, with its cache."""
    return first_run[0].copy(tmp_path / "project", DVC_SITE_CACHE_DIR=str(tmp_path / "dvc"))


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    """A place where nothing reaches another process of this machine."""
    if reason := namespaces_refused():
        pytest.skip(reason)
    with Namespace() as space:
        yield space
