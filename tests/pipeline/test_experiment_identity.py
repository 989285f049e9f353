"""Tests of the identity of an experiment: what changes it, and what does not."""

import os
import subprocess
from contextlib import chdir
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import dvc_yaml
from pipeline.experiment_identity import ExperimentIdentities, describe_contents
from pipeline.params import load, read

ROOT = Path(__file__).parents[2]
IMAGES = Path("photos")


@pytest.fixture
def images(tmp_path: Path):
    """A folder with one image, in the current folder."""
    with chdir(tmp_path):
        IMAGES.mkdir()
        (IMAGES / "a.png").write_bytes(b"first")
        yield IMAGES / "a.png"


def git(*arguments: str) -> None:
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=b", *arguments], check=True, capture_output=True)


def test_replaced_image_changes_the_contents(images):
    """Without Git and DVC by size or time; an image that stays is the same contents."""
    before = describe_contents(IMAGES)
    assert describe_contents(IMAGES) == before and describe_contents(images) and not describe_contents(Path("absent"))
    os.utime(images, ns=(0, 1))
    assert describe_contents(IMAGES) != before


def test_images_in_git_are_identified_by_their_object(images):
    """The time of a file says nothing then; changes that are not committed count, as `dvc exp run` takes them along."""
    git("init", "--quiet")
    git("add", "photos")
    git("commit", "--quiet", "-m", "a")
    before = describe_contents(IMAGES)
    os.utime(images, ns=(0, 1))
    assert describe_contents(IMAGES) == before
    images.write_bytes(b"other")
    changed = describe_contents(IMAGES)
    git("commit", "--quiet", "-a", "-m", "b")
    assert before != changed != describe_contents(IMAGES) != before


def test_images_of_dvc_are_identified_by_their_hash(images):
    """They need not be in the folder: DVC fetches them."""
    Path("photos.dvc").write_text("outs: [{md5: abc.dir, path: photos}]")
    before = describe_contents(IMAGES)
    images.unlink()
    assert describe_contents(IMAGES) == before
    Path("photos.dvc").write_text("outs: [{md5: def.dir, path: photos}]")
    assert describe_contents(IMAGES) != before


def test_replaced_network_of_the_metrics_changes_the_identity(images):
    """The identity includes the files of evaluate.networks and of dataset.source, whose paths stay the same."""
    settings, stages = load(ROOT / "params.yaml"), dvc_yaml.stages(read(ROOT / "params.yaml"), ROOT / "dvc.yaml")
    settings = replace(
        settings,
        dataset=replace(settings.dataset, source="photos"),
        evaluate=replace(settings.evaluate, networks={"inception": "inception.pt"}),
    )
    stages = {"evaluate": stages["evaluate"]}
    identities = set()
    for file in (Path("inception.pt"), Path("inception.pt"), images):
        identities.add(ExperimentIdentities().compute(stages, settings))
        file.write_bytes(file.read_bytes() + b"more" if file.exists() else b"weights")
    assert len(identities) == 3
    assert ExperimentIdentities().compute(stages, settings) not in identities
