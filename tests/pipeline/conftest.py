"""Fixture of a project to run commands in: it has this project's settings and code, and no artifacts."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import pytest

from tests.command_line_project import CommandLineProject


@pytest.fixture(scope="session")
def initialized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder `.dvc` written by `dvc init`, once per session."""
    folder = tmp_path_factory.mktemp("initialized")
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], cwd=folder, check=True)
    return folder / ".dvc"


@pytest.fixture
def project(tmp_path: Path, initialized: Path) -> CommandLineProject:
    """A new project."""
    return CommandLineProject.of_settings(tmp_path, initialized)


@pytest.fixture
def current_project(project: CommandLineProject) -> Iterator[CommandLineProject]:
    """A new project, as the current folder."""
    with chdir(project.folder):
        yield project
