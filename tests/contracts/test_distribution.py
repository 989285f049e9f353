"""Source distribution and wheel: the sources, and no file of a user's."""

import subprocess
import sys
import tarfile
import zipfile
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
SOURCES = ("pipeline", "stages", "models", "hydra_plugins", "conf", "tests", "benchmarks", "docs")


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a source distribution and a wheel that are built in a used checkout."""
    folder = tmp_path_factory.mktemp("checkout")
    CommandLineProject.of_working_tree(folder)
    for name in PRIVATE:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("private")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-t", "wheel"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder / "dist"


@pytest.fixture(scope="module")
def names(distributions: Path) -> set[str]:
    """Names in the source distribution."""
    (archive,) = distributions.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        return {name.partition("/")[2] for name in tar.getnames()}


def test_no_private_file_is_distributed(names: set[str]):
    """Images in DVC's cache, results, databases, secrets and what else lies in the folder."""
    assert names.isdisjoint(PRIVATE)
    tops = {name.partition("/")[0] for name in names if "/" in name}
    assert tops == {*SOURCES, "data", ".dvc"}
    assert {name for name in names if name.startswith(".dvc/")} == {
        ".dvc/config",
        *(f".dvc/plots/{name}" for name in ("bars.json", "curves.json", "page.html")),
    }


def test_every_source_file_is_distributed(names: set[str]):
    """Code, settings, tests, documents, the demo's images and the files that commands read."""
    root = Path(__file__).parents[2]
    listing = subprocess.check_output(["git", "ls-files", *SOURCES, "data"], cwd=root, text=True)
    assert set(listing.splitlines()) <= names
    assert {
        "vqvae2.py",
        "dvc.yaml",
        "params.yaml",
        "constraints.txt",
        "Makefile",
        "README.md",
        "LICENSE",
        "PKG-INFO",
    } <= names


def test_wheel_has_the_packages_and_the_python_api(distributions: Path):
    """`import vqvae2` works where the wheel is installed."""
    (archive,) = distributions.glob("*.whl")
    with zipfile.ZipFile(archive) as wheel:
        tops = {name.partition("/")[0] for name in wheel.namelist() if ".dist-info/" not in name}
    assert tops == {"pipeline", "stages", "models", "hydra_plugins", "vqvae2.py"}
