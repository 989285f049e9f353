"""Tests of `vqvae2 plan`."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import pytest

from models.classifier import Classifier
from models.config import ClassifierConfig
from pipeline import params
from pipeline.commands import plan
from stages.config import ClassifierStageConfig, Params, TrainConfig

ROOT = Path(__file__).parents[3]


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Params]:
    """The settings of params.yaml, in a folder without images and without conf/."""
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    with chdir(tmp_path):
        yield params.load()


def write_images(settings: Params, *classes: str) -> None:
    """Write an empty image file per class to the source of the settings: only names are read."""
    for name in classes:
        folder = Path(settings.dataset.source).with_suffix("") / name
        folder.mkdir(parents=True)
        (folder / "image.png").touch()
    text = Path("params.yaml").read_text(encoding="utf-8")
    source = settings.dataset.source
    text = text.replace(source, source.removesuffix(".zip")).replace("labels: labels.csv", "labels: folders")
    Path("params.yaml").write_text(text, encoding="utf-8")


def printed_plan(capsys: pytest.CaptureFixture[str]) -> dict:
    assert plan.show((), as_json=True) == 0
    return json.loads(capsys.readouterr().out)


def test_paper_model_has_its_size(project):
    """The VQ-VAE of the paper's ImageNet run, without images and without computing anything."""
    done = project.command("plan", "-S", "experiment=imagenet256", "-S", "cluster=local", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["trainings"][0]["stage"] == "vqvae" and result["trainings"][0]["parameters"] == 1_782_339
    assert [training["stage"] for training in result["trainings"]] == ["vqvae", "prior_top", "prior_bottom"]
    assert result["code_bytes_per_image"] == (32**2 + 64**2) * 9 / 8


def test_classes_of_the_images_are_counted(settings, capsys):
    """Classes come from the names in the source; every block of a prior has a row of its label table for each class."""
    write_images(settings, "cats", "dogs", "owls")
    unlabeled = {training.stage: training for training in plan.count(settings, 0)}
    result = printed_plan(capsys)
    assert result["classes"] == 3
    for prior in result["trainings"][1:]:
        assert prior["parameters"] == unlabeled[prior["stage"]].parameters + 3 * prior["parameters_per_class"]
        assert prior["parameters_per_class"] > 0
        assert prior["forward_flops"] == unlabeled[prior["stage"]].forward_flops  # a table lookup has no FLOPs
    assert result["trainings"][0]["parameters_per_class"] == 0


def test_missing_images_give_the_cost_per_class(settings, capsys):
    """Without images no class is counted, and the plan says so."""
    assert printed_plan(capsys)["classes"] is None
    _, top, bottom = plan.count(settings, 0)
    plan.show((), as_json=False)
    assert capsys.readouterr().out.splitlines()[4] == (
        "classes: unknown and not counted, because the images are missing; each class adds "
        f"{top.parameters_per_class:,} parameters to prior_top, "
        f"{bottom.parameters_per_class:,} parameters to prior_bottom"
    )


def test_classifiers_are_counted():
    """Each class adds a row and a bias to the last layer; a convolution costs the same for any number of classes."""
    small = ClassifierStageConfig(network=ClassifierConfig(channels=8, halvings=2), train=TrainConfig(10, 8))
    settings = dataclasses.replace(params.load(ROOT / "params.yaml"), classifiers={"shards": small})
    *_, training = plan.count(settings, 3)
    *_, without_classes = plan.count(settings, 0)
    assert training.stage == "classifier_shards" and training.parameters_per_class == 8 * 2**2 + 1
    network = Classifier(small.network, 3)
    assert training.parameters == sum(parameter.numel() for parameter in network.parameters())
    assert without_classes.parameters == training.parameters - 3 * training.parameters_per_class
    assert training.forward_flops > 0 and training.training_flops > 0


def test_a_frozen_network_has_no_backward_pass():
    """A step of a classifier with a pretrained network costs a forward pass; its weights need not be installed."""
    settings = params.load(ROOT / "params.yaml")
    costs = {}
    for name in ("residual", "efficientnet_lite2"):
        config = ClassifierStageConfig(ClassifierConfig(name=name), TrainConfig(10, 8))
        *_, costs[name] = plan.count(dataclasses.replace(settings, classifiers={"shards": config}), 3)
    assert costs["residual"].training_flops == 3 * costs["residual"].forward_flops * 10 * 8
    pretrained = costs["efficientnet_lite2"]
    assert pretrained.training_flops == pretrained.forward_flops * 10 * 8
    # The trunk has no moments.
    assert 4 * pretrained.parameters < pretrained.checkpoint_bytes < 4.1 * pretrained.parameters
    assert round(pretrained.parameters / 1e6, 1) == 4.8 and pretrained.parameters_per_class == 1281


def test_columns_are_aligned_below_long_names(settings, capsys):
    """Both tables, of cost and of memory per GPU, are as wide as their longest stage needs."""
    data = params.read()
    data["cluster"]["gpus_per_worker"] = 1
    train = {"steps": 10, "batch_size": 8}
    data["classifiers"] = {"shards": {"network": {"channels": 8, "halvings": 2}, "train": train}}
    Path("params.yaml").write_text(params.to_yaml(data), encoding="utf-8")
    plan.show((), as_json=False)
    lines = capsys.readouterr().out.splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("stage ")]
    assert len(starts) == 2
    for start in starts:
        assert lines[start + 4].startswith("classifier_shards ")
        assert len({len(line) for line in lines[start : start + 5]}) == 1


def test_unlabeled_images_have_no_classes(settings, capsys):
    """dataset.labels none needs no images to count the classes."""
    text = Path("params.yaml").read_text(encoding="utf-8")
    Path("params.yaml").write_text(text.replace("labels: labels.csv", "labels: none"), encoding="utf-8")
    assert printed_plan(capsys)["classes"] == 0
    plan.show((), as_json=False)
    assert capsys.readouterr().out.splitlines()[4] == "classes: none, because the images have no labels"


def test_plan_recommends_a_preset_for_the_images(settings, capsys):
    """The number of training images decides how often each is seen, and whether they are few."""
    Path("conf").symlink_to(ROOT / "conf")
    write_images(settings, "cats", "dogs", "owls")
    overrides = ["dataset=folder", "dataset.source=data/fluent-emoji-64", "dataset.image_size=64"]
    assert plan.show(overrides, as_json=False) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[6].startswith(
        "preset: networks, steps and sampling without an override are those of experiment=emoji32"
    )
    assert "training: 2 images, which the VQ-VAE sees 32,000 times in 2,000 steps of 32" in lines
    assert any(line.startswith("2 training images are few") for line in lines)
    assert lines[-1] == "recommended: vqvae2 run -S experiment=photos64 -S dataset.source=data/fluent-emoji-64"


def test_measured_times_are_printed_per_stage(settings, capsys):
    """Without images, the stages that process each of them are left out; classes are not needed."""
    Path("conf").symlink_to(ROOT / "conf")
    overrides = ["experiment=smoke", "dataset.source=missing"]
    assert plan.show(overrides, as_json=True, measure=True) == 0
    seconds = json.loads(capsys.readouterr().out)["seconds"]
    assert set(seconds) == {"vqvae", "prior_top", "prior_bottom", "sample"} and all(seconds.values())
    plan.show(overrides, as_json=False, measure=True)
    lines = capsys.readouterr().out.splitlines()
    assert "time, measured on this machine for 1 x 1 CPU:" in lines
    assert sum(line.startswith(("vqvae ", "together ")) for line in lines) == 3


def test_stages_are_measured_with_their_own_workers(settings, capsys):
    """One with other workers says so, and its time is that of its share of the images. Of a range the fewest count."""
    Path("conf").symlink_to(ROOT / "conf")
    overrides = ["experiment=smoke", "dataset.source=missing", "+cluster.stages.sample.workers=[2,8]"]
    plan.show(overrides, as_json=False, measure=True)
    lines = capsys.readouterr().out.splitlines()
    assert "time, measured on this machine for 1 x 1 CPU:" in lines
    assert [line.split()[0] for line in lines if line.endswith("  for 2 x 1 CPU")] == ["sample"]


def test_memory_is_counted_if_any_training_has_gpus(settings, capsys):
    """Other stages with GPUs need none of this."""
    Path("conf").symlink_to(ROOT / "conf")
    for stage, is_counted in (("prior_top", True), ("sample", False)):
        plan.show(["experiment=smoke", f"+cluster.stages.{stage}.gpus_per_worker=1"], as_json=False)
        assert ("GB per GPU" in capsys.readouterr().out) == is_counted
