"""The stages that train, encode and sample: what they make depends on settings and seed alone."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from models.config import LevelConfig, VQVAEConfig
from stages import codes, prior, sample, vqvae
from stages.config import CodesConfig, SampleConfig
from stages.errors import UserError
from stages.formats import artifact, model_file
from stages.formats.codes import open_codes
from stages.formats.samples import open_samples
from stages.formats.shards import open_shards
from stages.images.tensors import to_float
from stages.sample import Models, choose_labels
from stages.training import ray_train
from stages.training.loop import Stopped, Worker
from tests.screen import Screen

pytestmark = pytest.mark.usefixtures("in_process")


def digest(folder: Path) -> str:
    return artifact.sha256(folder / artifact.MANIFEST)


@pytest.mark.parametrize("stage", ["vqvae", "top", "bottom"])
def test_training_again_makes_the_same_bytes(project, stage: str):
    """Weights, curves and pictures: the digest of everything in the folder is equal."""
    if stage == "vqvae":
        project.vqvae(out="again", fingerprint="again")
        assert digest(project.path("again")) == digest(project.path("vqvae"))
    else:
        project.prior(stage, out="again_priors", fingerprint="again")
        assert digest(project.path("again_priors") / stage) == digest(project.path("priors") / stage)


@pytest.mark.parametrize("stage", ["vqvae", "bottom"])
def test_a_training_stage_that_was_stopped_ends_in_the_same_bytes(project, monkeypatch, stage: str):
    """Run again, it goes on, and nobody can tell."""

    def stopped(train_worker, arguments, *, context):
        train_worker(worker=Worker(stopping=lambda: True), context=context, **arguments)

    if stage == "vqvae":
        first, second = project.path("vqvae"), project.path("stopped")
        again = lambda: project.vqvae(out="stopped", fingerprint="stopped")  # noqa: E731
    else:
        first, second = project.path("priors") / stage, project.path("stopped_priors") / stage
        again = lambda: project.prior(stage, out="stopped_priors", fingerprint="stopped")  # noqa: E731
    with monkeypatch.context() as patch, pytest.raises(Stopped, match="step 1"):
        patch.setattr(ray_train, "fit", stopped)
        again()
    again()
    assert digest(second) == digest(first)


def test_a_training_that_diverges_says_so(project, monkeypatch):
    """The error names the number and the step, also where a measure cannot be drawn from it."""
    endless = {"values": torch.ones(1), "squared": torch.full((1,), torch.inf), "commitment": torch.ones(1)}
    monkeypatch.setattr(vqvae, "_totals", lambda *found: endless)
    with pytest.raises(UserError, match=r"mse became inf by step 2[\s\S]*Lower learning_rate"):
        project.vqvae(out="diverged", fingerprint="diverged")


def test_another_seed_makes_another_model(project):
    """The seed matters; the equality above is able to fail."""
    project.vqvae(seed=1, out="other", fingerprint="other")
    assert digest(project.path("other")) != digest(project.path("vqvae"))


def test_codes_are_what_the_vqvae_says_of_each_image(project):
    """Row by row, level by level, as encoding the image itself."""
    codes = open_codes(project.path("codes"))
    network, _ = model_file.load_vqvae(project.path("vqvae"))
    images = open_shards(project.path("shards")).split("validation")
    found = codes.split("validation")
    encoded = network.encode(
        to_float(torch.from_numpy(np.stack([images.read(i) for i in range(4)])), torch.device("cpu"))
    )
    assert list(found.keys) == list(images.keys) and (found.labels == images.labels).all()
    for level, grid in encoded.items():
        assert (found.codes[level] == grid.numpy()).all()


def test_codes_of_images_that_the_vqvae_has_not_learnt_from_are_made_and_told(project, tmp_path: Path):
    """A model may be given other images, by whoever knows what they do."""
    screen = Screen()
    context = replace(project.run("codes", "others"), reporter=screen)
    rest = {"codes": CodesConfig(), "augment": project.augment, "seed": 0, "run": context}
    _, found = model_file.load_vqvae(project.path("vqvae"))
    for name, meta in (("same", found.meta), ("other", {**found.meta, "shards": "0" * 64})):
        folder = tmp_path / name
        weights = model_file.load_vqvae(project.path("vqvae"))[0].state_dict()
        model_file.write(folder, "vqvae", weights, meta, history=[], pictures={})
        codes.run(project.path("shards"), folder, tmp_path / f"{name}_codes", tmp_path / "codes.json", **rest)
    assert screen.notes == ["These shards are not those the VQ-VAE was trained on."]
    assert len(open_codes(tmp_path / "other_codes").split("train")) == 12


def test_copies_are_of_training_images_alone_and_the_first_is_plain(project):
    """Two rows per training image, one per validation image; copy 0 does not depend on how many there are."""
    project.codes(copies=1, out="plain", fingerprint="plain")
    codes, plain = open_codes(project.path("codes")), open_codes(project.path("plain"))
    assert len(codes.split("train")) == 24 and len(codes.split("validation")) == 4
    for level in codes.levels:
        assert (codes.split("train").plain().codes[level] == plain.split("train").codes[level]).all()


@pytest.mark.parametrize(("stage", "worker"), [(codes, codes.Encode), (sample, sample.Draw)], ids=["codes", "sample"])
def test_parts_that_are_finished_are_kept_and_end_in_the_same_bytes(project, monkeypatch, stage, worker):
    """A stage that is stopped between parts makes only the missing ones when it runs again."""
    name = stage.__name__.rpartition(".")[2]
    made, writer = [], "_encode" if stage is codes else "_write"
    original = getattr(worker, writer)

    def counted(self, *arguments):
        if len(made) == 2 and "stopped" not in made:
            made.append("stopped")
            raise KeyboardInterrupt
        made.append(arguments)
        return original(self, *arguments)

    monkeypatch.setattr(worker, writer, counted)
    again = lambda: getattr(project, name)(out=f"again_{name}", fingerprint="again")  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        again()
    again()
    assert len(made) == 1 + (7 if stage is codes else 3)  # the stop, and each copy of each part once
    expected = digest(project.path("codes" if stage is codes else "samples"))
    assert digest(project.path(f"again_{name}")) == expected

    # DVC removes what a stage has made when it is killed before it could tell; a part may have rotted since.
    shutil.rmtree(project.path(f"again_{name}"))
    damaged = min((project.folder / "runs" / name / "again" / "parts").glob("*.parquet"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    before = len(made)
    again()
    assert len(made) == before + (2 if stage is codes else 1)  # that part, of which codes have two copies
    assert digest(project.path(f"again_{name}")) == expected


@pytest.mark.parametrize("stage", [codes, sample], ids=["codes", "sample"])
def test_an_end_that_fails_costs_no_finished_part(project, monkeypatch, stage):
    """The disk is full when the parts are put together: the next attempt makes none of them again."""
    name = stage.__name__.rpartition(".")[2]
    with monkeypatch.context() as patch:
        patch.setattr(artifact, "commit", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            getattr(project, name)(out=f"full_{name}", fingerprint="full")
    monkeypatch.setattr(codes.Encode, "_encode", lambda *_: pytest.fail("codes were made again"))
    monkeypatch.setattr(sample.Draw, "_write", lambda *_: pytest.fail("samples were drawn again"))
    getattr(project, name)(out=f"full_{name}", fingerprint="full")
    assert digest(project.path(f"full_{name}")) == digest(project.path("codes" if stage is codes else "samples"))


def test_parts_on_another_disk_are_copied(project, monkeypatch):
    """A scratch disk for runs/ gives no second names to files elsewhere."""
    monkeypatch.setattr(artifact.os, "link", lambda *_: (_ for _ in ()).throw(OSError(18, "Invalid cross-device link")))
    project.codes(out="copied", fingerprint="copied")
    assert digest(project.path("copied")) == digest(project.path("codes"))


def test_codes_name_the_vqvae_that_made_them(project):
    """In the manifest, and in the schema of each file."""
    codes = open_codes(project.path("codes"))
    expected = digest(project.path("vqvae"))
    assert codes.vqvae == expected
    schema = pq.read_schema(codes.found.path(codes.files("train")[0]))
    assert json.loads(schema.metadata[b"vqvae2"])["vqvae"] == expected


def test_every_flipped_bit_in_a_codes_file_is_caught(project, tmp_path: Path):
    """A thousand flips, each refused with the file's name, by the manifest's hash."""
    folder = tmp_path / "codes"
    shutil.copytree(project.path("codes"), folder)
    codes = open_codes(folder)
    path = codes.found.path(codes.files("train")[0])
    data = path.read_bytes()
    random = np.random.default_rng(0)
    for place in random.integers(0, 8 * len(data), 1000):
        damaged = bytearray(data)
        damaged[place // 8] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=path.name):
            open_codes(folder).found.verify()


def test_samples_depend_on_their_number_alone(project):
    """Not on how many are drawn at once, nor on how they fall into parts, nor on the sampler."""
    project.sample(out="other_samples", fingerprint="other", batch_size=10, images_per_part=7, method="naive")
    one, other = open_samples(project.path("samples")), open_samples(project.path("other_samples"))
    for level in one.levels:
        assert (one.drawn.codes[level] == other.drawn.codes[level]).all()
    assert (one.images(0, 10) == other.images(0, 10)).all()


def test_classes_are_drawn_as_often_as_training_images_have_them(project):
    """Half of the training images are light, so half of the samples are."""
    labels = open_samples(project.path("samples")).labels
    assert np.bincount(labels).tolist() == [5, 5]


def test_named_classes_are_drawn_in_turn_and_unknown_ones_refused(project):
    """The message lists the classes there are."""
    project.sample(out="light", fingerprint="light", classes=("light",))
    assert (open_samples(project.path("light")).labels == 1).all()
    with pytest.raises(UserError, match=r"'gray' is no class[\s\S]*Use one of: dark, light"):
        project.sample(out="gray", fingerprint="gray", classes=("gray",))


def test_no_class_can_be_asked_of_models_without(project):
    """The letter says what to do instead."""
    with pytest.raises(UserError, match="These priors were trained without classes") as caught:
        choose_labels(SimpleNamespace(classes=()), SampleConfig(classes=("light",)))
    assert caught.value.where == "sample.classes" and "Leave it empty" in caught.value.fix and caught.value.code == 2


def test_shards_of_another_size_are_refused_before_training(project, monkeypatch):
    """As levels need them; the letter names the shards, and the command that makes them anew."""
    levels = {"top": LevelConfig(32, 8, 4, 1, 16, 4), "bottom": LevelConfig(4, 8, 4, 1, 16, 4)}
    monkeypatch.setattr(ray_train, "fit", lambda *_, **__: pytest.fail("training began"))
    with pytest.raises(UserError, match=r"another image size than vqvae\.levels are for: image_size is 16") as caught:
        vqvae.run(
            project.path("shards"), project.path("other"), *project.files("vqvae"), vqvae=VQVAEConfig(levels),
            augment=project.augment, train_vqvae=project.train, seed=0, context=project.run("vqvae", "other"),
        )  # fmt: skip
    assert caught.value.where == str(project.path("shards")) and "--stage shard" in caught.value.fix


def test_training_that_ends_early_is_told_with_its_steps(project, monkeypatch):
    """Whatever the reason: no half-trained model is taken for a whole one."""
    monkeypatch.setattr(ray_train, "fit", lambda *_, **__: None)
    with pytest.raises(UserError, match=r"Training ended at step 0 of 12\.") as caught:
        project.vqvae(out="early", fingerprint="early")
    assert "runs/vqvae/early" in caught.value.where and "Run the same command again" in caught.value.fix


def test_priors_of_another_vqvae_are_refused(project):
    """Codes of one VQ-VAE mean nothing to another."""
    project.vqvae(seed=1, out="foreign", fingerprint="foreign")
    with pytest.raises(UserError, match="The prior of level top learnt codes of VQ-VAE") as caught:
        Models.load(project.path("foreign"), project.path("priors"))
    assert caught.value.where == str(project.path("priors") / "top")
    assert (caught.value.fix, caught.value.code) == ("Run: vqvae2 run --stage prior_top", 5)


def test_a_flipped_bit_in_the_weights_is_refused(project, tmp_path: Path):
    """No damaged model is ever used."""
    folder = tmp_path / "vqvae"
    shutil.copytree(project.path("vqvae"), folder)
    path = folder / model_file.WEIGHTS
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        model_file.load_vqvae(folder)


def test_a_level_without_codes_is_refused_before_training(project):
    """The message names the levels there are."""
    with pytest.raises(UserError, match="no codes of level 'middle', only of top, bottom") as caught:
        prior.run(
            "middle",
            project.path("codes"),
            project.path("priors") / "middle",
            *project.files("prior_middle"),
            prior=None,  # type: ignore[arg-type]  # not reached
            seed=0,
            context=project.run("prior@middle"),
        )
    assert (caught.value.where, caught.value.code) == (str(project.path("codes")), 2)
    assert caught.value.fix == "Name the prior after a level of vqvae.levels."


def test_the_picture_shows_images_above_their_reconstructions(project):
    """One row of images, and one for each prefix of levels."""
    network, _ = model_file.load_vqvae(project.path("vqvae"))
    png = vqvae.draw(network, np.zeros((3, 16, 16, 3), np.uint8))["reconstructions"]
    with Image.open(io.BytesIO(png)) as picture:
        width, height = picture.size
    assert width == height  # three images, in three rows


def test_weights_of_another_network_are_refused_in_one_sentence(project, tmp_path: Path):
    """A reader is told, and sees no list of tensors."""
    network, found = model_file.load_vqvae(project.path("vqvae"))
    weights = {name: tensor for name, tensor in network.state_dict().items() if "decoder" not in name}
    model_file.write(tmp_path / "vqvae", "vqvae", weights, found.meta, history=[], pictures={})
    with pytest.raises(UserError, match="The weights do not fit this version's network") as caught:
        model_file.load_vqvae(tmp_path / "vqvae")
    assert str(tmp_path / "vqvae") in caught.value.where and caught.value.fix and caught.value.code == 5


@pytest.mark.parametrize("loader_workers", [0, 1])
def test_a_damaged_image_is_named_whoever_reads_it(project, tmp_path: Path, loader_workers: int):
    """Also from a loader's process, the error arrives whole: what, where, fix and exit code, and no traceback."""
    shutil.copytree(project.path("shards"), tmp_path / "shards")
    images = open_shards(tmp_path / "shards").split("train")
    path = tmp_path / "shards" / images.shards[0]
    data = bytearray(path.read_bytes())
    data[int(images.offsets[2]) + 40] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"^Image {images.keys[2]} in {path.name} is damaged") as error:
        list(vqvae.load_batches(vqvae.PlainImages(images, range(4)), batch_size=2, num_workers=loader_workers))
    assert error.value.where == str(path) and error.value.fix and error.value.code == 4
