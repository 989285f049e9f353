"""Source distribution: the sources, and no file of a user's."""

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.command_line_project import CommandLineProject

# What a used checkout holds besides the sources.
PRIVATE = (
    ".dvc/cache/files/md5/00/11",
    ".dvc/config.local",
    ".env",
    "artifacts/samples/part-00000.parquet",
    "data/holiday/0.png",
    "data/holiday.zip",
    "drawn/00000.png",
    "dvc_plots/index.html",
    "mlflow.db",
    "mlruns/1/artifacts/samples.png",
    "notebook.ipynb",
    "runs/shard/0123/part",
)
SOURCES = ("pipeline", "stages", "models", "conf", "tests", "benchmarks", "docs")


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in a source distribution that is built in a used checkout."""
    folder = tmp_path_factory.mktemp("checkout")
    CommandLineProject.of_working_tree(folder)
    for name in PRIVATE:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("private")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    (archive,) = (folder / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        return {name.partition("/")[2] for name in tar.getnames()}


def test_no_private_file_is_distributed(names: set[str]):
    """Images in DVC's cache, results, databases, secrets and what else lies in the folder."""
    assert names.isdisjoint(PRIVATE)
    tops = {name.partition("/")[0] for name in names if "/" in name}
    assert tops == {*SOURCES, "data"}


def test_every_source_file_is_distributed(names: set[str]):
    """Code, settings, tests, documents, the demo's images and the files that commands read."""
    root = Path(__file__).parents[2]
    listing = subprocess.check_output(["git", "ls-files", *SOURCES, "data"], cwd=root, text=True)
    assert set(listing.splitlines()) <= names
    assert {"dvc.yaml", "params.yaml", "constraints.txt", "Makefile", "README.md", "LICENSE", "PKG-INFO"} <= names
