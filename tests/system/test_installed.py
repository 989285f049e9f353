"""Whole runs of the installed wheel, in projects without source files and beside foreign packages."""

import re
from pathlib import Path

import pytest
from PIL import Image

from pipeline.dvc_yaml import VERSIONS_STAGE
from tests.command_line_project import ROOT, SMOKE
from tests.installed import Installation, build_wheel
from tests.system.test_end_to_end import STAGES


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """The installed wheel of the working tree."""
    folder = tmp_path_factory.mktemp("installed")
    return Installation.of_wheel(build_wheel(ROOT, folder / "dist"), folder)


@pytest.fixture(scope="module")
def pets(installation: Installation) -> Path:
    """A project of the wheel for a folder of photographs, which has packages with names of ours, too."""
    for number in range(32):
        split = "train" if number < 24 else "validation"
        path = installation.folder / "photos" / split / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 40), 20 + number).save(path)
    installation.call("vqvae2", "init", "pets", "--data", "photos")
    for name in ("models", "pipeline", "stages"):
        (installation.folder / "pets" / name).mkdir()
        (installation.folder / "pets" / name / "__init__.py").write_text("raise SystemExit('foreign code')\n")
    return installation.folder / "pets"


@pytest.mark.slow
def test_workers_import_the_code_of_the_wheel(installation: Installation, pets: Path):
    """Ray Data's and Ray Train's workers do, although the project has packages with names of ours."""
    result = installation.call("vqvae2", "run", *SMOKE, "--stage", "vqvae", folder="pets")
    assert result.stages("runs") == {"shard", "vqvae"} and "foreign" not in result.output
    output = installation.call("python", "-P", "-m", "dvc", "repro", "vqvae", folder="pets").output
    assert re.findall("Running stage '(.+)'", output) == [VERSIONS_STAGE]


@pytest.mark.slow
def test_project_of_the_wheel_runs_to_a_report(installation: Installation, pets: Path):
    """Every stage runs or is up to date, and `dvc repro` finds nothing to do."""
    result = installation.call("vqvae2", "run", *SMOKE, folder="pets")
    assert result.stages("runs") | result.stages("unchanged") == STAGES and "foreign" not in result.output
    assert (pets / "artifacts" / "report" / "report.html").is_file()
    output = installation.call("python", "-P", "-m", "dvc", "repro", folder="pets").output
    assert re.findall("Running stage '(.+)'", output) == [VERSIONS_STAGE]


@pytest.mark.slow
def test_demo_of_the_wheel_runs_to_a_report(installation: Installation):
    """One command in an empty folder. Repeated, it finds nothing to do."""
    result = installation.call("vqvae2", "demo", "demo", "--smoke")
    assert result.stages("runs") == STAGES
    name, project = result.output.splitlines()[-1].split()
    assert name == "project" and (Path(project) / "artifacts" / "report" / "report.html").is_file()
    assert "Everything is up to date." in installation.call("vqvae2", "demo", "demo", "--smoke").output
