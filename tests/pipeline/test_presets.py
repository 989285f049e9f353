"""Tests of presets: which images they fit, and which one is recommended."""

import shutil
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import pytest

from pipeline import params, presets
from pipeline.compose import compose_params
from stages.config import Params

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def conf(tmp_path: Path) -> Iterator[Path]:
    """A copy of conf/ in the current folder."""
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    with chdir(tmp_path):
        yield tmp_path / "conf"


def composed(overrides: list[str]) -> Params:
    return params.check(compose_params(overrides))


def warned(overrides: list[str], capsys: pytest.CaptureFixture[str], gpus: int = 0) -> str:
    presets.warn_kept(compose_params(overrides), composed(overrides), gpus=gpus)
    return capsys.readouterr().err


def advised(overrides: list[str], gpus: int = 0, num_train_images: int | None = None) -> presets.Advice:
    return presets.advise(compose_params(overrides), composed(overrides), gpus=gpus, num_train_images=num_train_images)


@pytest.mark.parametrize("preset", presets.PHOTO_PRESETS)
def test_photo_presets_state_their_size(preset):
    """The table of presets agrees with conf/experiment/."""
    settings = composed([f"experiment={preset.name}"])
    assert (settings.dataset.name, settings.dataset.image_size) == ("folder", preset.image_size)
    assert bool(settings.cluster.gpus_per_worker) == preset.requires_gpu


def test_a_preset_that_is_kept_for_other_images_is_stated(capsys):
    """The line names the preset, what it is made for, and the command for these images."""
    overrides = ["dataset=folder", "dataset.source='my photos'", "dataset.image_size=64"]
    assert warned(overrides, capsys) == (
        "note: networks, steps and sampling without an override are those of experiment=emoji32, which is made for "
        "emoji at 32 pixels, not for folder at 64 pixels. Recommended: vqvae2 run -S experiment=photos64 "
        "-S 'dataset.source=\"my photos\"'\n"
    )


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["seed=1"],
        ["dataset.validation_fraction=0.1"],
        ["experiment=clothing64", "dataset.source=other.zip"],
        ["experiment=photos64", "dataset.source=photos"],
        ["experiment=photos64", "dataset=clothing64"],
    ],
    ids=" ".join,
)
def test_a_preset_for_the_images_needs_no_note(overrides, capsys):
    """Photo presets fit any images of their size."""
    assert warned(overrides, capsys) == ""


def test_a_file_of_the_user_is_a_preset(conf, capsys):
    """It is made for the images that it names."""
    (conf / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /dataset: folder\ndataset:\n  image_size: 64\n"
    )
    assert warned(["experiment=mine", "dataset.source=photos"], capsys) == ""
    assert "experiment=mine, which is made for folder at 64" in warned(
        ["experiment=mine", "dataset.image_size=128"], capsys
    )


@pytest.mark.parametrize(
    ("size", "gpus", "expected"),
    [
        (32, 0, ["experiment=photos32"]),
        (48, 0, ["experiment=photos32", "dataset.image_size=48"]),
        (64, 0, ["experiment=photos64"]),
        (80, 1, ["experiment=photos64", "dataset.image_size=80"]),
        (128, 1, ["experiment=photos128"]),
        (128, 0, ["experiment=photos64"]),
        (512, 1, ["experiment=photos256", "dataset.image_size=512"]),
    ],
)
def test_recommended_preset_fits_size_and_machine(size, gpus, expected):
    """Without a GPU the images are smaller, and the reason is stated."""
    advice = advised(["dataset=folder", "dataset.source=photos", f"dataset.image_size={size}"], gpus)
    assert advice.overrides == [expected[0], "dataset.source=photos", *expected[1:]]
    assert any("need a GPU" in remark for remark in advice.remarks) == (size == 128 and not gpus)
    composed(list(advice.overrides))


def test_a_data_set_of_the_user_is_kept():
    """Its file and the overrides of its images are part of the recommended command."""
    overrides = ["dataset=clothing128", "dataset.labels=none", "seed=3"]
    assert advised(overrides, gpus=1).overrides == [
        "experiment=photos128", "dataset=clothing128", "dataset.labels=none"
    ]  # fmt: skip


def test_a_preset_that_needs_a_gpu_is_stated():
    """The command for this machine is a remark: the run may be planned for another one."""
    advice = advised(["experiment=imagenet256"])
    assert advice.fit.fits and advice.command == "vqvae2 run -S experiment=imagenet256"
    assert "needs a GPU" in advice.remarks[0] and "experiment=photos64" in advice.remarks[0]


def test_many_images_need_more_steps():
    """Each image is seen a few times; few images are repeated by the priors."""
    advice = advised(["experiment=photos64"], num_train_images=100_000)
    assert advice.overrides == ["experiment=photos64", "train_vqvae.steps=9375"]
    assert not advised(["experiment=photos64"], num_train_images=3000).remarks[1:]
    assert "are few" in advised(["experiment=photos64"], num_train_images=300).remarks[-1]


def test_images_in_a_folder_of_any_name_are_recommended(capsys):
    """The recommended command quotes what Hydra cannot read without quotes."""
    message = warned(["dataset.source='/tmp/Köln (1)'", "dataset.image_size=64"], capsys)
    assert """'dataset.source="/tmp/Köln (1)"'""" in message


def test_preset_that_is_missing_prevents_only_the_recommendation(conf, capsys):
    """A note says why there is none."""
    (conf / "experiment" / "photos64.yaml").unlink()
    assert warned(["dataset=folder", "dataset.source=/tmp/x"], capsys) == (
        "note: no preset can be recommended: photos64 is not a valid experiment.\n"
    )
