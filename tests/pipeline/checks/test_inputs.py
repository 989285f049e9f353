"""Tests of the checks of what the stages read."""

from dataclasses import replace
from pathlib import Path

import pytest

from models.config import ClassifierConfig
from pipeline import params
from pipeline.checks import inputs
from pipeline.checks.check import Request
from stages.config import ClassifierStageConfig
from stages.errors import UserError
from stages.formats import pretrained

STAGES = ("shard", "vqvae", "codes", "sample", "evaluate")


@pytest.fixture
def settings(current_project):
    """The settings of a project that is the current folder."""
    return params.load()


def request(settings, stages=STAGES, **options):
    return Request(settings, "params.yaml", stages, **options)


def with_source(settings, source):
    return replace(settings, dataset=replace(settings.dataset, source=source))


@pytest.mark.parametrize("source", ["photos/mine", "photos/mine/train", "photos/mine/train/"])
def test_images_that_dvc_tracks_are_pulled(settings, source):
    """The fix is the command that fetches them, also if the source is a folder inside of what DVC tracks."""
    Path("photos").mkdir()
    Path("photos/mine.dvc").write_text("outs: []\n")
    with pytest.raises(UserError, match="is tracked by DVC, and not in this folder") as caught:
        inputs.check_images(request(with_source(settings, source)))
    assert caught.value.fix == "Run: dvc pull photos/mine.dvc. Or add --pull to the run."
    inputs.check_images(request(with_source(settings, source), pull=True))


def test_missing_images_without_a_dvc_file_are_refused(settings):
    """No command can fetch them."""
    with pytest.raises(UserError, match="does not exist") as caught:
        inputs.check_images(request(with_source(settings, "photos")))
    assert "dvc" not in caught.value.fix
    inputs.check_images(request(with_source(settings, "photos"), stages=("vqvae",)))  # the shards exist already


def test_inputs_of_the_last_stages_are_checked_before_the_first(settings):
    """A run would reach them after the training. Each is checked only if its stage is to run."""
    inputs.check_late_inputs(request(settings))
    weights = replace(settings, evaluate=replace(settings.evaluate, networks={"inception": "inception.pt"}))
    with pytest.raises(UserError, match="feature network does not exist") as caught:
        inputs.check_late_inputs(request(weights))
    assert caught.value.where == "evaluate.networks.inception: inception.pt" and caught.value.code == 2
    inputs.check_late_inputs(request(weights, stages=("vqvae",)))
    quantizer = replace(settings.vqvae.quantizer, mode="none")
    continuous = replace(settings, vqvae=replace(settings.vqvae, quantizer=quantizer))
    with pytest.raises(UserError, match="does not quantize has no codes"):
        inputs.check_late_inputs(request(continuous))
    inputs.check_late_inputs(request(continuous, stages=("shard", "vqvae")))


def test_missing_weights_of_a_pretrained_critic_are_found_before_the_first_stage(settings, monkeypatch):
    """Only if the stage is to run: the trained critic has the weights."""
    package = pretrained.CRITIC_PACKAGES["efficientnet_lite2"]._replace(distribution="no_such_package")
    monkeypatch.setitem(pretrained.CRITIC_PACKAGES, "efficientnet_lite2", package)
    critic = ClassifierStageConfig(ClassifierConfig(name="efficientnet_lite2"), settings.train_vqvae)
    settings = replace(settings, classifiers={"shards": critic})
    with pytest.raises(UserError, match="are not installed"):
        inputs.check_late_inputs(request(settings, stages=("shard", "classifier@shards")))
    inputs.check_late_inputs(request(settings, stages=("shard", "classifier@vqvae", "reject@samples")))


@pytest.mark.parametrize("source", [".", "..", "../project"])
def test_source_that_contains_the_project_is_refused(settings, tmp_path: Path, monkeypatch, source: str):
    """DVC fails with an error about .dvcignore. Folders inside of the project, or beside it, are allowed."""
    (tmp_path / "project" / "photos").mkdir(parents=True)
    (tmp_path / "proj").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    with pytest.raises(UserError, match=r"contains the project\.[\s\S]*folder of their own"):
        inputs.check_images(request(with_source(settings, source), stages=("vqvae",)))
    for allowed in ("photos", "../proj"):
        inputs.check_images(request(with_source(settings, allowed), stages=("vqvae",)))


@pytest.mark.parametrize("out", ["photos/drawn", "photos/../photos", "photos/drawn.npz"])
def test_outputs_inside_the_source_of_images_are_refused(tmp_path: Path, monkeypatch, out: str):
    """A command that writes there would change the data set. Without a project there is no source."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    inputs.require_outside_project_source(Path(out))
    Path("params.yaml").write_text("dataset: {source: photos}\n")
    inputs.require_outside_project_source(Path("drawn"))
    with pytest.raises(UserError, match="must be outside of the source of images"):
        inputs.require_outside_project_source(Path(out))
