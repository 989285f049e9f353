"""The stages vqvae, codes, prior and sample: their artifacts depend only on settings and seed."""

import io
import json
import shutil
from dataclasses import replace
from functools import partial
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
from stages.inference.trained_models import TrainedModels, choose_labels
from stages.training.distributed import DistributedContext
from stages.training.image_batches import PlainImages, load_batches
from stages.training.loop import TrainingStopped
from tests.mini_pipeline import without_ray
from tests.screen import Screen

pytestmark = pytest.mark.usefixtures("in_process")


def digest(folder: Path) -> str:
    """Return the hash of a manifest, which has the hashes of all files of the folder."""
    return artifact.sha256(folder / artifact.MANIFEST)


@pytest.mark.parametrize("stage", ["vqvae", "top", "bottom"])
def test_a_repeated_training_writes_equal_files(project, stage: str):
    """Weights, curves and images have equal hashes."""
    if stage == "vqvae":
        project.vqvae(out="again", fingerprint="again")
        assert digest(project.path("again")) == digest(project.path("vqvae"))
    else:
        project.prior(stage, out="again_priors", fingerprint="again")
        assert digest(project.path("again_priors") / stage) == digest(project.path("priors") / stage)


@pytest.mark.parametrize("stage", ["vqvae", "bottom"])
def test_a_stopped_training_stage_resumes_to_equal_files(project, stage: str):
    """The artifact of a resumed training equals that of an unbroken one."""

    def fit_and_stop(train_worker, arguments, *, context):
        train_worker(dist=DistributedContext(stop_requested=lambda: True), context=context, **arguments)

    if stage == "vqvae":
        unbroken, resumed = project.path("vqvae"), project.path("stopped")
        run_stage = partial(project.vqvae, out="stopped", fingerprint="stopped")
    else:
        unbroken, resumed = project.path("priors") / stage, project.path("stopped_priors") / stage
        run_stage = partial(project.prior, stage, out="stopped_priors", fingerprint="stopped")
    with without_ray(fit=fit_and_stop), pytest.raises(TrainingStopped, match="step 1"):
        run_stage()
    run_stage()
    assert digest(resumed) == digest(unbroken)


def test_a_diverging_training_fails_with_the_metric_and_the_step(project, monkeypatch):
    """An infinite MSE is reported as such, although its PSNR is undefined."""
    infinite = {"values": torch.ones(1), "squared": torch.full((1,), torch.inf), "commitment": torch.ones(1)}
    monkeypatch.setattr(vqvae, "loss_sums", lambda *losses: infinite)
    with pytest.raises(UserError, match=r"mse must be finite, got inf at step 2[\s\S]*Lower learning_rate"):
        project.vqvae(out="diverged", fingerprint="diverged")


def test_another_seed_trains_another_model(project):
    """The comparisons above can fail."""
    project.vqvae(seed=1, out="other", fingerprint="other")
    assert digest(project.path("other")) != digest(project.path("vqvae"))


def test_codes_equal_those_of_encoding_each_image(project):
    """Keys, labels and the codes of every level match, row by row."""
    codes = open_codes(project.path("codes"))
    network, _ = model_file.load_vqvae(project.path("vqvae"))
    images = open_shards(project.path("shards")).split("validation")
    rows = codes.split("validation")
    encoded = network.encode(
        to_float(torch.from_numpy(np.stack([images.read(i) for i in range(4)])), torch.device("cpu"))
    )
    assert list(rows.keys) == list(images.keys) and (rows.labels == images.labels).all()
    for level, grid in encoded.items():
        assert (rows.codes[level] == grid.numpy()).all()


def test_codes_of_other_shards_than_the_training_shards_are_reported(project, tmp_path: Path):
    """The stage encodes other shards, and reports that they differ."""
    screen = Screen()
    context = replace(project.run("codes", "others"), reporter=screen)
    settings = {"codes": CodesConfig(), "augment": project.augment, "seed": 0, "context": context}
    network, model = model_file.load_vqvae(project.path("vqvae"))
    for name, meta in (("same", model.meta), ("other", {**model.meta, "shards": "0" * 64})):
        folder = tmp_path / name
        weights = network.state_dict()
        model_file.write(folder, "vqvae", weights, meta, history=[], images={})
        codes.run(project.path("shards"), folder, tmp_path / f"{name}_codes", **settings)
    assert screen.messages == ["The VQ-VAE was trained on other shards than these."]
    assert len(open_codes(tmp_path / "other_codes").split("train")) == 12


def test_only_training_images_have_augmented_copies(project):
    """Two rows per training image and one per validation image; copy 0 does not depend on the number of copies."""
    project.codes(copies=1, out="plain", fingerprint="plain")
    codes, plain = open_codes(project.path("codes")), open_codes(project.path("plain"))
    assert len(codes.split("train")) == 24 and len(codes.split("validation")) == 4
    for level in codes.levels:
        assert (codes.split("train").originals().codes[level] == plain.split("train").codes[level]).all()


@pytest.mark.parametrize(("stage", "worker"), [(codes, codes.Encode), (sample, sample.Draw)], ids=["codes", "sample"])
def test_a_stopped_stage_reuses_finished_parts(project, monkeypatch, stage, worker):
    """Run again, the stage computes only the missing parts, and writes equal files."""
    name = stage.__name__.rpartition(".")[2]
    calls, method = [], "_encode" if stage is codes else "_write"
    original = getattr(worker, method)

    def counted(self, *arguments):
        if len(calls) == 2 and "stopped" not in calls:
            calls.append("stopped")
            raise KeyboardInterrupt
        calls.append(arguments)
        return original(self, *arguments)

    monkeypatch.setattr(worker, method, counted)
    run_stage = partial(getattr(project, name), out=f"again_{name}", fingerprint="again")
    with pytest.raises(KeyboardInterrupt):
        run_stage()
    run_stage()
    assert len(calls) == 1 + (7 if stage is codes else 3)  # the stop, and each copy of each part once
    expected = digest(project.path("codes" if stage is codes else "samples"))
    assert digest(project.path(f"again_{name}")) == expected

    # DVC removes the outputs of a stage that was killed before DVC recorded them. A finished part may be damaged since.
    shutil.rmtree(project.path(f"again_{name}"))
    damaged = min((project.folder / "runs" / name / "again" / "parts").glob("*.parquet"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    calls.clear()
    run_stage()
    assert len(calls) == (2 if stage is codes else 1)  # the damaged part, of which codes have two copies
    assert digest(project.path(f"again_{name}")) == expected


@pytest.mark.parametrize(
    ("name", "result", "worker", "method"),
    [("codes", "codes", codes.Encode, "_encode"), ("sample", "samples", sample.Draw, "_write")],
    ids=["codes", "sample"],
)
def test_a_failed_commit_keeps_the_finished_parts(project, monkeypatch, name: str, result: str, worker, method: str):
    """If the disk is full when the artifact is committed, the next attempt computes no part again."""
    commit, attempts = artifact.commit, []

    def fail_once(*arguments) -> None:
        attempts.append(arguments)
        if len(attempts) == 1:
            raise OSError(28, "No space left on device")
        commit(*arguments)

    monkeypatch.setattr(artifact, "commit", fail_once)
    run_stage = partial(getattr(project, name), out=f"full_{name}", fingerprint="full")
    with pytest.raises(OSError, match="No space left"):
        run_stage()
    monkeypatch.setattr(worker, method, lambda *_: pytest.fail("a part was computed again"))
    run_stage()
    assert digest(project.path(f"full_{name}")) == digest(project.path(result))


def test_parts_on_another_disk_are_copied(project, monkeypatch):
    """runs/ may be on another disk, where hard links to the artifact are impossible."""
    monkeypatch.setattr(artifact.os, "link", lambda *_: (_ for _ in ()).throw(OSError(18, "Invalid cross-device link")))
    project.codes(out="copied", fingerprint="copied")
    assert digest(project.path("copied")) == digest(project.path("codes"))


def test_codes_hold_the_digest_of_their_vqvae(project):
    """It is in the manifest and in the schema of each Parquet file."""
    codes = open_codes(project.path("codes"))
    expected = digest(project.path("vqvae"))
    assert codes.vqvae == expected
    schema = pq.read_schema(codes.artifact.path(codes.files("train")[0]))
    assert json.loads(schema.metadata[b"vqvae2"])["vqvae"] == expected


def test_every_flipped_bit_in_a_codes_file_is_detected(project, tmp_path: Path):
    """The hash in the manifest detects each of a thousand flips, and the error has the file name."""
    folder = tmp_path / "codes"
    shutil.copytree(project.path("codes"), folder)
    codes = open_codes(folder)
    path = codes.artifact.path(codes.files("train")[0])
    data = path.read_bytes()
    random = np.random.default_rng(0)
    for bit in random.integers(0, 8 * len(data), 1000):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=path.name):
            open_codes(folder).artifact.verify()


def test_a_sample_depends_only_on_its_number(project):
    """Batch size, parts and sampling method do not change it."""
    project.sample(out="other_samples", fingerprint="other", batch_size=10, images_per_part=7, method="naive")
    samples, others = open_samples(project.path("samples")), open_samples(project.path("other_samples"))
    for level in samples.levels:
        assert (samples.codes.codes[level] == others.codes.codes[level]).all()
    assert (samples.images(0, 10) == others.images(0, 10)).all()


def test_classes_are_drawn_in_the_proportions_of_the_training_images(project):
    """Half of the training images are light, and so are half of the samples."""
    labels = open_samples(project.path("samples")).labels
    assert np.bincount(labels).tolist() == [5, 5]


def test_configured_classes_are_drawn_in_turn_and_unknown_ones_refused(project):
    """The error lists the classes of the models."""
    project.sample(out="light", fingerprint="light", classes=("light",))
    assert (open_samples(project.path("light")).labels == 1).all()
    with pytest.raises(UserError, match=r"'gray' is not a valid class[\s\S]*Use any of: dark, light"):
        project.sample(out="gray", fingerprint="gray", classes=("gray",))


def test_classes_of_models_without_classes_are_refused(project):
    """The error has the setting to change."""
    with pytest.raises(UserError, match=r"There are no classes, got 'light'\.\n  in: sample\.classes") as caught:
        choose_labels(SimpleNamespace(classes=()), SampleConfig(classes=("light",)))
    assert caught.value.where == "sample.classes" and "Name no class." in caught.value.fix and caught.value.code == 2


def test_balanced_samples_have_equally_many_of_each_class():
    """Every class has its share, however rare it is in the training images, to within one."""
    models = SimpleNamespace(classes=("a", "b", "c"), label_counts=[90, 9, 1])
    equal = np.bincount(choose_labels(models, SampleConfig(count=31, balance="equal")))
    proportional = np.bincount(choose_labels(models, SampleConfig(count=100)), minlength=3)
    assert equal.tolist() == [11, 10, 10] and abs(proportional - [90, 9, 1]).max() <= 1


def test_shards_of_another_image_size_are_refused_before_training(project):
    """The error has the shards and the command that regenerates them."""
    context = project.run("vqvae", "size")
    levels = {"top": LevelConfig(32, 8, 4, 1, 16, 4), "bottom": LevelConfig(4, 8, 4, 1, 16, 4)}
    with pytest.raises(
        UserError, match=r"vqvae\.levels do not fit the image size of these shards: image_size .*16"
    ) as caught:
        vqvae.run(
            project.path("shards"), project.path("other"), *project.files("vqvae"), vqvae=VQVAEConfig(levels),
            augment=project.augment, train_vqvae=project.train, seed=0, context=context,
        )  # fmt: skip
    assert not any(context.work_dir.iterdir())  # no checkpoint
    assert caught.value.where == str(project.path("shards")) and "--stage shard" in caught.value.fix


def test_an_incomplete_training_is_not_written_as_a_model(project):
    """The error has the last step and the number of steps."""
    with (
        without_ray(fit=lambda *_, **__: None),
        pytest.raises(UserError, match=r"Training ended at step 0 of 12\.") as caught,
    ):
        project.vqvae(out="early", fingerprint="early")
    assert "runs/vqvae/early" in caught.value.where and "Run the same command again" in caught.value.fix


def test_priors_of_another_vqvae_are_refused(project):
    """Another VQ-VAE cannot decode the codes of a prior."""
    project.vqvae(seed=1, out="foreign", fingerprint="foreign")
    with pytest.raises(UserError, match="The prior of level top must be trained on codes of VQ-VAE") as caught:
        TrainedModels.load(project.path("foreign"), project.path("priors"))
    assert caught.value.where == str(project.path("priors") / "top")
    assert (caught.value.fix, caught.value.code) == ("Run: vqvae2 run --stage prior_top", 5)


def test_a_flipped_bit_in_the_weights_is_refused(project, tmp_path: Path):
    """A damaged model is never used."""
    folder = tmp_path / "vqvae"
    shutil.copytree(project.path("vqvae"), folder)
    path = folder / model_file.WEIGHTS
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        model_file.load_vqvae(folder)


def test_a_prior_of_an_unknown_level_is_refused_before_training(project):
    """The error lists the levels of the codes."""
    with pytest.raises(UserError, match="The prior's level must be one of top, bottom, got 'middle'") as caught:
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


def test_the_contact_sheet_shows_images_above_their_reconstructions(project):
    """It has one row of images, and one row of reconstructions for each prefix of levels."""
    network, _ = model_file.load_vqvae(project.path("vqvae"))
    png = vqvae.draw_reconstructions(network, np.zeros((3, 16, 16, 3), np.uint8))["reconstructions"]
    with Image.open(io.BytesIO(png)) as picture:
        width, height = picture.size
    assert width == height  # three images, in three rows


def test_weights_of_another_network_are_refused(project, tmp_path: Path):
    """The error is one sentence, without a list of tensors."""
    network, model = model_file.load_vqvae(project.path("vqvae"))
    weights = {name: tensor for name, tensor in network.state_dict().items() if "decoder" not in name}
    model_file.write(tmp_path / "vqvae", "vqvae", weights, model.meta, history=[], images={})
    with pytest.raises(UserError, match="The weights do not match the network of this version") as caught:
        model_file.load_vqvae(tmp_path / "vqvae")
    assert str(tmp_path / "vqvae") in caught.value.where and caught.value.fix and caught.value.code == 5


@pytest.mark.parametrize("loader_workers", [0, 1])
def test_a_damaged_image_raises_a_user_error_also_from_a_loader_process(project, tmp_path: Path, loader_workers: int):
    """The error keeps its message, place, fix and exit code, and has no traceback."""
    shutil.copytree(project.path("shards"), tmp_path / "shards")
    images = open_shards(tmp_path / "shards").split("train")
    path = tmp_path / "shards" / images.shards[0]
    data = bytearray(path.read_bytes())
    data[int(images.offsets[2]) + 40] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"^Image {images.keys[2]} in {path.name} is damaged") as caught:
        list(load_batches(PlainImages(images, range(4)), batch_size=2, num_workers=loader_workers))
    assert caught.value.where == str(path) and caught.value.fix and caught.value.code == 4
