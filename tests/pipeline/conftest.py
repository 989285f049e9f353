"""A project to run commands in: the settings and code of this one, its own data and artifacts."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]


class Project:
    """A folder in which `vqvae2` runs."""

    def __init__(self, folder: Path, initialized: Path):
        self.folder = folder
        for name in ("stages", "models", "data"):
            (folder / name).symlink_to(ROOT / name)
        for name in ("dvc.yaml", "params.yaml", ".dvcignore"):
            shutil.copyfile(ROOT / name, folder / name)
        shutil.copytree(ROOT / "conf", folder / "conf")
        shutil.copytree(initialized, folder / ".dvc")

    def edit(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Change params.yaml."""
        yaml, path = YAML(typ="safe", pure=True), self.folder / "params.yaml"
        yaml.sort_base_mapping_type_on_output = False  # levels have an order
        data = yaml.load(path)
        change(data)
        with path.open("w", encoding="utf-8") as file:
            yaml.dump(data, file)

    def command(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run `vqvae2` with arguments, as a process."""
        code = "from pipeline.cli import main; main()"
        return subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=self.folder,
            env={**os.environ, "COLUMNS": "100", "NO_COLOR": "1", **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )


@pytest.fixture(scope="session")
def initialized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `dvc init` makes, once."""
    folder = tmp_path_factory.mktemp("initialized")
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], cwd=folder, check=True)
    return folder / ".dvc"


@pytest.fixture
def project(tmp_path: Path, initialized: Path) -> Project:
    return Project(tmp_path, initialized)
