"""Tests of the checks of the project's folder."""

import os
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import pytest

from pipeline.checks import project_folder
from pipeline.checks.machine import GIB
from stages.errors import UserError
from tests.mounts import mount_prefix

ROOT = Path(__file__).parents[3]


def test_full_disk_is_an_error_and_little_space_a_warning():
    """The folder may be a link to another disk, so it is named."""
    assert project_folder.judge_disk(20 * GIB).fix == ""
    assert project_folder.judge_disk(2 * GIB).fix == "Free some space."
    with pytest.raises(UserError, match=r"The disk is full: 0\.1 GiB free in runs\.") as caught:
        project_folder.judge_disk(GIB // 10, Path("runs"))
    assert caught.value.code == 3 and caught.value.fix


def test_folder_that_cannot_be_written_is_refused(project):
    """Also one of several: an artifact's folder on another disk, mounted read-only."""
    (project.folder / "artifacts" / "priors").mkdir(parents=True)
    path = project.folder / "artifacts"
    mounted = mount_prefix(f"mount --bind {path} {path} && mount -o remount,bind,ro {path}")
    code = "import os; from pipeline.checks import project_folder; project_folder.check_permissions(os.environ)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*mounted, sys.executable, "-c", code], cwd=project.folder, env=environment, capture_output=True, text=True
    )
    assert "UserError" in done.stderr and "artifacts is not writable" in done.stderr


def test_package_of_another_project_is_refused(current_project, tmp_path):
    """Ray's workers would import it instead of the code of the command. A folder without __init__.py is none."""
    assert project_folder.check_folder(os.environ).text == str(current_project.folder)
    (current_project.folder / "models").unlink()
    (current_project.folder / "models").mkdir()
    project_folder.check_folder(os.environ)
    (current_project.folder / "models" / "__init__.py").touch()
    with pytest.raises(UserError, match=r"The folder models/ is a Python package of another project") as caught:
        project_folder.check_folder(os.environ)
    assert caught.value.code == 2 and "Rename it" in caught.value.fix
    (current_project.folder / "models" / "__init__.py").unlink()
    (current_project.folder / "stages.py").touch()
    with pytest.raises(UserError, match=r"The file stages\.py is a Python module of another project"):
        project_folder.check_folder(os.environ)


def test_folder_with_braces_is_refused(tmp_path):
    """DVC fails there while it stores the result of a stage."""
    path = tmp_path / "{a}"
    path.mkdir()
    (path / "dvc.yaml").touch()
    with chdir(path), pytest.raises(UserError, match=r"must have neither \{ nor \}") as caught:
        project_folder.check_folder(os.environ)
    assert caught.value.where == str(path) and caught.value.code == 2


def test_folder_whose_name_is_not_utf8_is_refused(tmp_path):
    """The name cannot be recorded in params.yaml, journals and MLflow. The error itself can be printed."""
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    try:
        path.mkdir()
    except OSError:
        pytest.skip("this file system refuses such names")
    (path / "dvc.yaml").touch()
    with chdir(path), pytest.raises(UserError, match="must be UTF-8") as caught:
        project_folder.check_folder(os.environ)
    assert str(caught.value).encode() and caught.value.fix == "Rename the folder."
