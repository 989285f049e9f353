"""constraints.txt and the installed packages hold one torch, and nothing built against another one."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
CONSTRAINTS = ROOT / "constraints.txt"
COMPANIONS = {"torchvision", "torchaudio"}  # each release is built for one release of torch


def test_constraints_require_one_torch():
    """constraints.txt names torch once, none of its companions and no CUDA package."""
    names = [re.split(r"[^\w-]", line)[0] for line in CONSTRAINTS.read_text().splitlines()]
    assert names.count("torch") == 1
    assert not COMPANIONS & set(names)
    assert not [name for name in names if name.startswith("nvidia-")]


def test_installed_torch_is_the_tested_one():
    """One torch is installed, without its companions. A torch for CPUs has no CUDA packages beside it."""
    pinned = re.search(r"^torch==(\S+)", CONSTRAINTS.read_text(), re.MULTILINE)
    distributions = [
        ((dist.metadata["Name"] or "").lower(), dist.version) for dist in importlib.metadata.distributions()
    ]
    (version,) = [version for name, version in distributions if name == "torch"]
    assert pinned and version.partition("+")[0] == pinned[1]
    names = {name for name, _ in distributions}
    assert not COMPANIONS & names
    if not torch.backends.cuda.is_built():
        assert not [name for name in names if name.startswith("nvidia-")]


@pytest.mark.parametrize("name", ["dvc", "mlflow", "ray", "torch"])
def test_support_matrix_states_the_lower_bounds(name: str):
    """The lowest accepted versions are those that pyproject.toml requires."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (bound,) = re.findall(rf"^{name}(?:\[.*\])?>=([\d.]+)", "\n".join(dependencies), re.MULTILINE)
    row = {"dvc": "DVC", "mlflow": "MLflow", "ray": "Ray", "torch": "PyTorch"}[name]
    (accepted,) = re.findall(rf"^\| {row} \|.*\| (.*) \|$", (ROOT / "docs/support.md").read_text(), re.MULTILINE)
    assert accepted.startswith(f"{bound} or newer")


@pytest.mark.parametrize(("name", "excluded"), [("dvc", "3.65.0"), ("hydra-core", "1.3.1")])
def test_releases_that_do_not_work_are_excluded(name: str, excluded: str):
    """DVC accepts a pathspec it cannot import, Hydra an omegaconf that warns."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (requirement,) = [line for line in map(Requirement, dependencies) if line.name == name]
    assert not requirement.specifier.contains(excluded)
