"""The trained model of the demo, in data/: it is the one that dvc.lock records, and draws images."""

import hashlib
import json

import pytest

import vqvae2
from pipeline import dvc_yaml, params
from pipeline.finished_results import md5_of
from tests.command_line_project import ROOT

FOLDER = ROOT / "data" / "emoji32-model"


@pytest.mark.parametrize(
    ("stage", "name"), [("vqvae", "vqvae"), ("prior@top", "priors/top"), ("prior@bottom", "priors/bottom")]
)
def test_model_is_that_of_the_recorded_demo(stage: str, name: str):
    """DVC identifies a folder by the MD5 of a list of its files."""
    outs = dvc_yaml.parse_lock(params.read(ROOT / "dvc.lock"))[stage]["outs"]
    (recorded,) = (out["md5"] for out in outs if out["path"] == f"artifacts/{name}")
    files = sorted(path for path in (FOLDER / name).rglob("*") if path.is_file())
    listing = [{"md5": md5_of(path), "relpath": path.relative_to(FOLDER / name).as_posix()} for path in files]
    text = json.dumps(listing, sort_keys=True)
    assert recorded == hashlib.md5(text.encode(), usedforsecurity=False).hexdigest() + ".dir"


def test_model_draws_images_without_training():
    """The same seed gives the same images."""
    model = vqvae2.load(FOLDER)
    first, again = (model.sample(2, classes=["flags"], seed=3) for _ in range(2))
    assert [image.size for image in first] == [(32, 32)] * 2
    assert [image.tobytes() for image in first] == [image.tobytes() for image in again]
