"""Tests of the checks of the machine."""

import importlib.metadata
import os

import pytest

from pipeline.checks import machine
from stages.errors import UserError

GIB = machine.GIB


@pytest.mark.parametrize(
    ("answer", "text", "fix"),
    [
        (machine.judge_memory(GIB, 8 * GIB), "1.0 of 8.0 GiB available", "Close other programs"),
        (machine.judge_memory(4 * GIB, 8 * GIB), "4.0 of 8.0 GiB available", ""),
        (machine.judge_shared_memory(GIB // 16), "0.062 GiB", "--shm-size=2g"),
        (machine.judge_shared_memory(GIB), "1 GiB", ""),
        (machine.judge_packages({"torch": "2"}), "torch 2", ""),
        (machine.judge_torchvision("0.28.0", ["torch==2.13.0"], "2.12.0"), "requires torch 2.13.0", "pip uninstall"),
        (machine.judge_torchvision("0.28.0", [], "2.12.0"), "requires one exact", "pip uninstall torchvision"),
        (machine.judge_torchvision("0.28.0", ["numpy", "torch==2.13.0"], "2.13.0+cpu"), "for the installed torch", ""),
        (machine.judge_torchvision(None, [], "2.13.0"), "not installed, not required", ""),
    ],
)
def test_checks_have_a_fix_unless_they_pass(answer, text, fix):
    """A warning has a fix."""
    assert text in answer.text and fix in answer.fix and bool(answer.fix) == bool(fix)


def test_missing_package_is_an_error():
    """The error names it and the command that installs it."""
    with pytest.raises(UserError, match=r"Packages are missing: ray\.") as caught:
        machine.judge_packages({"torch": "2", "ray": None})
    assert "pip install" in caught.value.fix and caught.value.code == 3


def test_installed_packages_are_reported_with_their_versions():
    """The check reads the metadata of this environment."""
    assert f"torch {importlib.metadata.version('torch')}" in machine.check_packages(os.environ).text
    assert machine.installed_version("no-such-package") is None
