"""Fixtures of one real run of the smallest pipeline. Every test starts from a copy of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command_line_project import SMOKE, CommandLineProject, CommandResult
from tests.namespace import Namespace, missing_namespace_support


@pytest.hookimpl(tryfirst=True)  # before that of all tests, which groups them by the marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder as `ray`."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.ray)


# The environment of a container: no home, no locale, a minimal terminal, and no connection to the internet.
CONTAINER = {"HOME": "/proc/nobody", "LC_ALL": "C", "TERM": "dumb", "COLUMNS": "40"}
CONTAINER |= dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")


@pytest.fixture(scope="session")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[CommandLineProject, CommandResult]:
    """The project after `vqvae2 run -S experiment=smoke`, and the result of the command. Tests must not change it."""
    folder = tmp_path_factory.mktemp("first")
    project = CommandLineProject.of_working_tree(
        folder / "a baker's prøject"
    )  # a space, a quote and a non-ASCII letter
    project.environment["DVC_SITE_CACHE_DIR"] = str(folder / "dvc")
    return project, CommandLineProject(project.folder, project.environment | CONTAINER).run(*SMOKE)


@pytest.fixture
def project(first_run: tuple[CommandLineProject, CommandResult], tmp_path: Path) -> CommandLineProject:
    """A copy of the finished project, with its cache."""
    return first_run[0].copy(tmp_path / "project", DVC_SITE_CACHE_DIR=str(tmp_path / "dvc"))


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    """A namespace whose processes cannot reach others of this machine."""
    if reason := missing_namespace_support():
        pytest.skip(reason)
    with Namespace() as namespace:
        yield namespace
