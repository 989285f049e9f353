"""Made-up weights of the classifier's pretrained network, in the place of its package."""

from pathlib import Path

import pytest
import torch
from efficientnet_lite_pytorch import EfficientNet

from stages.formats.pretrained import CRITIC_PACKAGES
from stages.metrics.weights_package import digest


def install_weights(site_packages: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a package with random weights into an importable folder; return the file of the weights."""
    package = CRITIC_PACKAGES["efficientnet_lite2"]
    info = site_packages / f"{package.distribution.replace('-', '_')}-{package.version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package.distribution}\nVersion: {package.version}\n")
    path = site_packages / package.file
    path.parent.mkdir(parents=True)
    torch.manual_seed(1)
    torch.save(EfficientNet.from_name("efficientnet-lite2").state_dict(), path)
    monkeypatch.setitem(CRITIC_PACKAGES, "efficientnet_lite2", package._replace(sha256=digest(path)))
    monkeypatch.syspath_prepend(str(site_packages))
    return path
