"""Tests of the shard stage, with its parts mapped one after another in this process."""

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages import shard
from stages.config import ClusterConfig, DatasetConfig
from stages.errors import UserError
from stages.formats.shards import open_shards
from stages.runtime.context import StageContext
from tests.mini_pipeline import without_ray
from tests.screen import Screen

SIZE = 8

pytestmark = pytest.mark.usefixtures("in_process")


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), np.uint8)


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(seed)).save(buffer, "PNG")
    return buffer.getvalue()


def make(path: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


IMAGES = {f"{'cat' if seed < 10 else 'dog'}/{seed}.png": png(seed) for seed in range(20)}


def run_shard(source: Path, base: Path, cluster: ClusterConfig | None = None, **settings) -> Screen:
    values = {
        "name": "test",
        "source": str(source),
        "image_size": SIZE,
        "images_per_shard": 6,
        "validation_fraction": 0.2,
    }
    screen = Screen()
    context = StageContext("shard", "f", base / "work", cluster or ClusterConfig(), screen)
    shard.run(
        source, base / "out", base / "metrics.json", dataset=DatasetConfig(**(values | settings)), context=context
    )
    return screen


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_a_tar_gives_the_bytes_of_its_folder(tmp_path, mode: str):
    """A compressed one is decompressed once, to a file that is deleted at the end."""
    run_shard(make(tmp_path / "images", IMAGES), tmp_path)
    source = tmp_path / "images.tar"
    with tarfile.open(source, mode) as tar:
        for folder in ("cat", "dog"):
            tar.add(tmp_path / "images" / folder, folder)
    screen = run_shard(source, tmp_path / "tar")
    assert files_of(tmp_path / "tar/out") == files_of(tmp_path / "out")
    assert not list(tmp_path.rglob("source.tar")) and not list(tmp_path.rglob(".source.tar*"))
    assert any("Decompressing images.tar" in message for message in screen.messages) == (mode != "w")


def test_every_image_is_written_once_with_its_class(tmp_path):
    """Pixels, classes, splits, counts and shard sizes are as configured."""
    run_shard(make(tmp_path / "images", IMAGES), tmp_path)
    shards = open_shards(tmp_path / "out")
    shards.artifact.verify()
    train, validation = shards.split("train"), shards.split("validation")
    assert (len(train), len(validation)) == (16, 4) and shards.classes == ("cat", "dog")
    expected = {pixels(seed).tobytes(): seed // 10 for seed in range(20)}
    for images in (train, validation):
        for position in range(len(images)):
            assert expected.pop(images.read(position).tobytes()) == images.labels[position]
    assert not expected
    assert [ref.shard for ref in shards.shard_refs()] == [
        *("train-00000.tar", "train-00001.tar", "train-00002.tar", "validation-00000.tar")
    ]
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"images": 20}
    assert shards.artifact.meta["images"] == {"train": 16, "validation": 4, "test": 0}
    assert sum(shards.artifact.meta["per_class"]["train"].values()) == 16


def test_splits_classes_and_doubts_are_stated_first(tmp_path):
    """A user sees how the folders were understood before the images are converted."""
    files = {"train/cat/1.png": png(1), "train/dog/2.png": png(2), "train/test/3.png": png(3), "dev/cat/4.png": png(4)}
    screen = run_shard(make(tmp_path / "images", files), tmp_path)
    assert screen.messages[:2] == ["Images: train 3, validation 1.", "Classes (3): cat 2, dog 1, test 1."]
    assert screen.messages[2].startswith(
        "DOUBT: The folder test is used as a class, although it is named like the test"
    )


def test_the_source_file_of_each_image_is_recorded(tmp_path):
    """KEY.json has name and class, also for a name that is not UTF-8; a key is never a name."""
    names = {"a/x.v1.png": png(0), "a/x.v2.png": png(1), "a/\udcff\n.png": png(2)}
    run_shard(make(tmp_path / "images", names), tmp_path, validation_fraction=0.0)
    with tarfile.open(tmp_path / "out" / "train-00000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    origins = [json.loads(data) for name, data in members.items() if name.endswith(".json")]
    assert {origin["name"] for origin in origins} == set(names) and {origin["label"] for origin in origins} == {"a"}
    assert sorted(members) == [f"{key:09d}.{kind}" for key in range(3) for kind in ("cls", "json", "png")]
    assert r"a/\udcff\n.png" in open_shards(tmp_path / "out").index["source"].to_pylist()


def test_two_runs_give_the_same_bytes(tmp_path):
    """A folder in any order of creation and an archive of it give equal shards."""
    make(tmp_path / "forward", IMAGES)
    make(tmp_path / "backward", dict(reversed(IMAGES.items())))
    with tarfile.open(tmp_path / "archive.tgz", "w:gz") as tar:
        tar.add(tmp_path / "backward", ".")
    outputs = []
    for name in ("forward", "backward", "archive.tgz"):
        run_shard(tmp_path / name, tmp_path / f"from-{name}")
        outputs.append(files_of(tmp_path / f"from-{name}" / "out"))
    assert outputs[0] == outputs[1] == outputs[2]


def test_a_rerun_skips_finished_shards(tmp_path, monkeypatch):
    """After an interruption the same command writes only the other shards, and the bytes are equal."""
    source = make(tmp_path / "images", IMAGES)
    run_shard(source, tmp_path / "uninterrupted")
    write_shard, written = shard.write_shard, []
    limit = 2  # shards until the interruption

    def write(path, images):
        if len(written) == limit:
            raise KeyboardInterrupt
        written.append(path.name.removesuffix(".writing"))
        return write_shard(path, images)

    monkeypatch.setattr(shard, "write_shard", write)
    with pytest.raises(KeyboardInterrupt):
        run_shard(source, tmp_path / "interrupted")
    assert not (tmp_path / "interrupted" / "out").exists()
    (tmp_path / "interrupted" / "work" / "parts" / "train-00001.tar").write_bytes(b"damaged since")
    limit = 100
    run_shard(source, tmp_path / "interrupted")
    assert written[2:] == ["train-00001.tar", "train-00002.tar", "validation-00000.tar"]
    assert files_of(tmp_path / "interrupted" / "out") == files_of(tmp_path / "uninterrupted" / "out")


def test_finished_shards_of_other_images_are_written_again(tmp_path):
    """Deleting an image moves others between shards; none is lost or duplicated."""
    source = make(tmp_path / "images", IMAGES)
    run_shard(source, tmp_path / "rerun")
    (source / "cat" / "0.png").unlink()
    run_shard(source, tmp_path / "rerun")
    run_shard(source, tmp_path / "fresh")
    assert files_of(tmp_path / "rerun" / "out") == files_of(tmp_path / "fresh" / "out")


def test_rejected_images_are_listed_and_the_others_written(tmp_path):
    """rejected.csv has every name and reason; the keys of the other images do not change."""
    bad = {"cat/empty.png": b"", "cat/text\n.jpg": b"hello", "dog/eps.eps": b"%!PS-Adobe", "loose.png": png(99)}
    screen = run_shard(make(tmp_path / "images", IMAGES | bad), tmp_path, max_rejected_fraction=0.2)
    with (tmp_path / "out" / "rejected.csv").open(newline="") as file:
        rejected = {row["name"]: row["reason"] for row in csv.DictReader(file)}
    assert rejected.keys() == {"cat/empty.png", r"cat/text\n.jpg", "dog/eps.eps", "loose.png"}
    assert rejected["cat/empty.png"] == "the file is empty" and "EPS is not supported" in rejected["dog/eps.eps"]
    assert "3 images are rejected; rejected.csv lists the reasons." in screen.messages
    meta = json.loads((tmp_path / "out" / "manifest.json").read_text())["meta"]
    assert sum(meta["images"].values()) == 20 and (meta["rejected"], meta["skipped"]) == (3, 1)


def test_too_many_rejected_images_fail_the_stage(tmp_path):
    """The error has the first 20 names with reasons, and the setting to raise; no output is written."""
    source = make(tmp_path / "images", IMAGES | {f"cat/bad{number:02d}.png": b"" for number in range(25)})
    with pytest.raises(UserError) as caught:
        run_shard(source, tmp_path)
    message = str(caught.value)
    assert caught.value.code == 4 and "25 of 45 images are rejected" in message and "and 5 more" in message
    assert message.count("the file is empty") == 20 and "max_rejected_fraction" in message
    assert not (tmp_path / "out").exists()


def test_duplicates_and_leaks_are_counted(tmp_path):
    """Equal pixels are detected under other names and formats, within a split and across splits."""
    buffer = io.BytesIO()
    Image.fromarray(pixels(0)).save(buffer, "BMP")
    files = {
        "train/a/1.png": png(0),
        "train/a/2.bmp": buffer.getvalue(),
        "train/b/3.png": png(1),
        "val/b/4.png": png(1),
    }
    screen = run_shard(make(tmp_path / "images", files), tmp_path)
    meta = json.loads((tmp_path / "out" / "manifest.json").read_text())["meta"]
    assert (meta["duplicates"], meta["leaked"]) == (2, 1)
    assert "LEAK: 1 validation image equals a training image, pixel for pixel." in screen.messages
    assert open_shards(tmp_path / "out").artifact.meta["leaked"] == 1


def test_conversions_are_counted(tmp_path):
    """They are in the manifest and in the messages."""
    buffer = io.BytesIO()
    Image.new("LA", (SIZE, SIZE)).save(buffer, "PNG")
    screen = run_shard(make(tmp_path / "images", IMAGES | {"cat/clear.png": buffer.getvalue()}), tmp_path)
    assert open_shards(tmp_path / "out").artifact.meta["conversions"] == {
        "transparency: composited on the background": 1
    }
    assert "1 image: transparency: composited on the background." in screen.messages


def test_one_image_without_label_is_accepted(tmp_path):
    """The dataset has one training image, no class and no validation image."""
    run_shard(make(tmp_path / "images", {"1.png": png(0)}), tmp_path)
    shards = open_shards(tmp_path / "out")
    train = shards.split("train")
    assert shards.classes == () and train.labels.tolist() == [-1] and (train.read(0) == pixels(0)).all()
    assert len(shards.split("validation")) == 0


def test_rejecting_all_training_images_fails_the_stage(tmp_path):
    """It fails even if every rejection is allowed."""
    source = make(tmp_path / "images", {"train/1.png": b"", "val/2.png": png(0)})
    with pytest.raises(UserError, match="All training images are rejected") as caught:
        run_shard(source, tmp_path, max_rejected_fraction=1.0)
    assert (caught.value.where, caught.value.code) == (str(source), 4)
    assert caught.value.fix.startswith("Fix the training images; the first one, train/1.png: ")


@pytest.mark.ray
def test_two_ray_workers_write_the_same_bytes_as_one_process(tmp_path):
    """The number of workers does not change the output."""
    source = make(tmp_path / "images", IMAGES)
    with without_ray():
        run_shard(source, tmp_path / "serial")
    run_shard(source, tmp_path / "ray", cluster=ClusterConfig(workers=2, cpus_per_worker=1))
    assert files_of(tmp_path / "ray" / "out") == files_of(tmp_path / "serial" / "out")


def test_jpeg_shards_are_close_to_the_source(tmp_path):
    """image_format: jpeg is lossy."""
    smooth = io.BytesIO()
    Image.linear_gradient("L").resize((SIZE, SIZE)).save(smooth, "PNG")
    run_shard(make(tmp_path / "images", {"1.png": smooth.getvalue()}), tmp_path, image_format="jpeg")
    read = open_shards(tmp_path / "out").split("train").read(0)
    assert np.abs(read[..., 0] - np.asarray(Image.open(smooth)).astype(int)).max() < 8


def test_an_invalid_background_is_rejected_before_reading_images(tmp_path):
    """It would otherwise reject every transparent image."""
    with pytest.raises(UserError, match="background must be a colour, got 'whitish'") as caught:
        run_shard(tmp_path / "missing", tmp_path, background="whitish")
    assert caught.value.code == 2
