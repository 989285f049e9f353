"""constraints.txt and the installed packages hold one torch, and nothing built against another one."""

import importlib.metadata
import re
from pathlib import Path

import torch

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
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
