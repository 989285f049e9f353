"""The trained models in data/: they draw images, and that of the demo is the one that dvc.lock records."""

import hashlib
import json
from pathlib import Path

import pytest

import vqvae2
from models.config import plain_settings
from pipeline import dvc_yaml, params
from pipeline.compose import compose_params
from pipeline.finished_results import md5_of
from tests.command_line_project import ROOT

DEMO, LONG = ROOT / "data" / "emoji32-model", ROOT / "data" / "emoji64-model"


@pytest.mark.parametrize(
    ("stage", "name"), [("vqvae", "vqvae"), ("prior@top", "priors/top"), ("prior@bottom", "priors/bottom")]
)
def test_model_is_that_of_the_recorded_demo(stage: str, name: str):
    """DVC identifies a folder by the MD5 of a list of its files."""
    outs = dvc_yaml.parse_lock(params.read(ROOT / "dvc.lock"))[stage]["outs"]
    (recorded,) = (out["md5"] for out in outs if out["path"] == f"artifacts/{name}")
    files = sorted(path for path in (DEMO / name).rglob("*") if path.is_file())
    listing = [{"md5": md5_of(path), "relpath": path.relative_to(DEMO / name).as_posix()} for path in files]
    text = json.dumps(listing, sort_keys=True)
    assert recorded == hashlib.md5(text.encode(), usedforsecurity=False).hexdigest() + ".dir"


@pytest.mark.parametrize(("folder", "side"), [(DEMO, 32), (LONG, 64)])
def test_model_draws_images_without_training(folder: Path, side: int):
    """It draws images of its size, the same for the same seed."""
    model = vqvae2.load(folder)
    first, again = (model.sample(2, classes=["flags"], seed=3) for _ in range(2))
    assert [image.size for image in first] == [(side, side)] * 2
    assert [image.tobytes() for image in first] == [image.tobytes() for image in again]


def test_preset_composes_the_settings_of_the_model():
    """The networks, image size and sampling rule of the committed model are those of `emoji64_long`."""
    settings = params.check(compose_params(["experiment=emoji64_long"], ROOT / "conf"), ROOT / "conf")
    networks = {"vqvae": settings.vqvae}
    networks |= {f"priors/{level}": prior.network for level, prior in settings.priors.items()}
    recorded = json.loads((LONG / "config.json").read_text())
    assert recorded["networks"] == {name: plain_settings(config) for name, config in networks.items()}
    assert recorded["image_size"] == settings.dataset.image_size
    assert recorded["sampling"] == settings.sample.describe_rule()
