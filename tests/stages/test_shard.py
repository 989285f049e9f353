"""The shard stage, its parts done one after the other."""

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
from stages.mapping.parts import map_parts
from stages.runtime.context import Reporter, StageContext

SIZE = 8


class Notes(Reporter):
    def __init__(self):
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(autouse=True)
def calls(monkeypatch) -> list[dict]:
    """Do the parts here; keep what each of them said."""
    results: list[dict] = []

    def serial(worker, arguments, parts, *, context, unit):
        built = worker(*arguments)
        results[:] = [built(json.loads(json.dumps(part))) for part in parts]
        return results

    monkeypatch.setattr(shard, "map_parts", serial)
    return results


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


def sharded(source: Path, base: Path, cluster: ClusterConfig | None = None, **settings) -> Notes:
    values = {
        "name": "test",
        "source": str(source),
        "image_size": SIZE,
        "images_per_shard": 6,
        "validation_fraction": 0.2,
    }
    context = StageContext("shard", "f", base / "work", cluster or ClusterConfig(), Notes())
    shard.run(
        source, base / "out", base / "metrics.json", dataset=DatasetConfig(**(values | settings)), context=context
    )
    return context.reporter


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_every_image_arrives_once_with_its_class(tmp_path):
    """Pixels, classes, splits and counts, in shards of the stated length."""
    sharded(make(tmp_path / "images", IMAGES), tmp_path)
    shards = open_shards(tmp_path / "out")
    shards.verify()
    train, validation = shards.split("train"), shards.split("validation")
    assert (len(train), len(validation)) == (16, 4) and shards.classes == ("cat", "dog")
    expected = {pixels(seed).tobytes(): seed // 10 for seed in range(20)}
    for images in (train, validation):
        for position in range(len(images)):
            assert expected.pop(images.read(position).tobytes()) == images.labels[position]
    assert not expected
    assert [part.shard for part in shards.parts()] == [
        *("train-00000.tar", "train-00001.tar", "train-00002.tar", "validation-00000.tar")
    ]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["images"] == {"train": 16, "validation": 4, "test": 0} and metrics["classes"] == 2
    assert shards.artifact.meta["images"] == metrics["images"]
    assert sum(shards.artifact.meta["per_class"]["train"].values()) == 16


def test_the_origin_of_each_image_is_kept(tmp_path):
    """KEY.json holds name and class, also a name that is no UTF-8; a key is never a name."""
    names = {"a/x.v1.png": png(0), "a/x.v2.png": png(1), "a/\udcff\n.png": png(2)}
    sharded(make(tmp_path / "images", names), tmp_path, validation_fraction=0.0)
    with tarfile.open(tmp_path / "out" / "train-00000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    origins = [json.loads(data) for name, data in members.items() if name.endswith(".json")]
    assert {origin["name"] for origin in origins} == set(names) and {origin["label"] for origin in origins} == {"a"}
    assert sorted(members) == [f"{key:09d}.{kind}" for key in range(3) for kind in ("cls", "json", "png")]
    assert r"a/\udcff\n.png" in open_shards(tmp_path / "out").index["source"].to_pylist()


def test_two_runs_give_the_same_bytes(tmp_path):
    """From a folder, a zip or a tar, and in whichever order the files were made."""
    make(tmp_path / "one", IMAGES)
    make(tmp_path / "two", dict(reversed(IMAGES.items())))
    with tarfile.open(tmp_path / "three.tgz", "w:gz") as tar:
        tar.add(tmp_path / "two", ".")
    for name in ("one", "two", "three.tgz"):
        sharded(tmp_path / name, tmp_path / f"from-{name}")
    one = files_of(tmp_path / "from-one" / "out")
    assert one == files_of(tmp_path / "from-two" / "out") == files_of(tmp_path / "from-three.tgz" / "out")


def test_a_rerun_keeps_finished_shards(tmp_path, monkeypatch):
    """Stopped after one shard, the same command does the others only, and ends in the same bytes."""
    source = make(tmp_path / "images", IMAGES)
    sharded(source, tmp_path / "unbroken")
    write, written = shard.write_shard, []

    def stops(path, samples):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        return write(path, samples)

    monkeypatch.setattr(shard, "write_shard", stops)
    with pytest.raises(KeyboardInterrupt):
        sharded(source, tmp_path / "broken")
    assert not (tmp_path / "broken" / "out").exists()
    (tmp_path / "broken" / "work" / "parts" / "train-00001.tar").write_bytes(b"damaged since")
    monkeypatch.setattr(shard, "write_shard", lambda path, samples: written.append(path.name) or write(path, samples))
    sharded(source, tmp_path / "broken")
    assert [name.removesuffix(".writing") for name in written[2:]] == [
        *("train-00001.tar", "train-00002.tar", "validation-00000.tar")
    ]
    assert files_of(tmp_path / "broken" / "out") == files_of(tmp_path / "unbroken" / "out")


def test_a_finished_shard_is_of_the_images_that_are_there_now(tmp_path):
    """Images that came or went unnoticed meanwhile move others from shard to shard; none is lost, none twice."""
    source = make(tmp_path / "images", IMAGES)
    sharded(source, tmp_path / "before")
    (source / "cat" / "0.png").unlink()
    sharded(source, tmp_path / "before")
    sharded(source, tmp_path / "anew")
    assert files_of(tmp_path / "before" / "out") == files_of(tmp_path / "anew" / "out")


def test_unusable_images_are_listed_and_the_others_kept(tmp_path):
    """rejected.csv holds every name and reason; the keys of the others do not move."""
    bad = {"cat/empty.png": b"", "cat/text\n.jpg": b"hello", "dog/eps.eps": b"%!PS-Adobe", "loose.png": png(99)}
    reporter = sharded(make(tmp_path / "images", IMAGES | bad), tmp_path, max_rejected_fraction=0.2)
    with (tmp_path / "out" / "rejected.csv").open(newline="") as file:
        rejected = {row["name"]: row["reason"] for row in csv.DictReader(file)}
    assert rejected.keys() == {"cat/empty.png", r"cat/text\n.jpg", "dog/eps.eps", "loose.png"}
    assert rejected["cat/empty.png"] == "the file is empty" and "EPS is not allowed" in rejected["dog/eps.eps"]
    assert "3 images could not be used; rejected.csv says why." in reporter.notes
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert sum(metrics["images"].values()) == 20 and (metrics["rejected"], metrics["left_out"]) == (3, 1)


def test_too_many_unusable_images_stop_the_stage(tmp_path):
    """With the first 20 names, their reasons, and the setting to raise; nothing is left at `out`."""
    source = make(tmp_path / "images", IMAGES | {f"cat/bad{number:02d}.png": b"" for number in range(25)})
    with pytest.raises(UserError) as caught:
        sharded(source, tmp_path)
    message = str(caught.value)
    assert caught.value.code == 4 and "25 of 45 images cannot be used" in message and "and 5 more" in message
    assert message.count("the file is empty") == 20 and "max_rejected_fraction" in message
    assert not (tmp_path / "out").exists()


def test_equal_pictures_are_counted_and_a_leak_is_said(tmp_path):
    """Equal pixels under other names and in other formats, within a split and across splits."""
    buffer = io.BytesIO()
    Image.fromarray(pixels(0)).save(buffer, "BMP")
    files = {
        "train/a/1.png": png(0),
        "train/a/2.bmp": buffer.getvalue(),
        "train/b/3.png": png(1),
        "val/b/4.png": png(1),
    }
    reporter = sharded(make(tmp_path / "images", files), tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["duplicates"], metrics["leaked"]) == (2, 1)
    assert "LEAK: 1 validation images equal a training image, pixel for pixel." in reporter.notes
    assert open_shards(tmp_path / "out").artifact.meta["leaked"] == 1


def test_what_was_done_to_images_is_counted(tmp_path):
    """Conversions stand in the manifest and in the notes."""
    buffer = io.BytesIO()
    Image.new("LA", (SIZE, SIZE)).save(buffer, "PNG")
    reporter = sharded(make(tmp_path / "images", IMAGES | {"cat/clear.png": buffer.getvalue()}), tmp_path)
    assert open_shards(tmp_path / "out").artifact.meta["conversions"] == {"transparency: laid on the background": 1}
    assert "1 images: transparency: laid on the background." in reporter.notes


def test_one_image_without_label_works(tmp_path):
    """One training image, no class, no validation image."""
    sharded(make(tmp_path / "images", {"1.png": png(0)}), tmp_path)
    shards = open_shards(tmp_path / "out")
    train = shards.split("train")
    assert shards.classes == () and train.labels.tolist() == [-1] and (train.read(0) == pixels(0)).all()
    assert len(shards.split("validation")) == 0


def test_no_readable_training_image_is_an_error(tmp_path):
    """Even where every rejection is allowed."""
    source = make(tmp_path / "images", {"train/1.png": b"", "val/2.png": png(0)})
    with pytest.raises(UserError, match="No training image could be read") as caught:
        sharded(source, tmp_path, max_rejected_fraction=1.0)
    assert (caught.value.where, caught.value.code) == (str(source), 4)
    assert caught.value.fix.startswith("Mend the training images; the first one, train/1.png: ")


@pytest.mark.ray
def test_two_workers_on_ray_write_what_one_process_writes(tmp_path, monkeypatch):
    """The number of workers is nowhere in the bytes."""
    source = make(tmp_path / "images", IMAGES)
    sharded(source, tmp_path / "serial")
    monkeypatch.setattr(shard, "map_parts", map_parts)
    sharded(source, tmp_path / "ray", cluster=ClusterConfig(workers=2, cpus_per_worker=1))
    assert files_of(tmp_path / "ray" / "out") == files_of(tmp_path / "serial" / "out")


def test_jpeg_shards_are_smaller_and_close(tmp_path):
    """encoding: jpeg."""
    smooth = io.BytesIO()
    Image.linear_gradient("L").resize((SIZE, SIZE)).save(smooth, "PNG")
    sharded(make(tmp_path / "images", {"1.png": smooth.getvalue()}), tmp_path, image_format="jpeg")
    read = open_shards(tmp_path / "out").split("train").read(0)
    assert np.abs(read[..., 0] - np.asarray(Image.open(smooth)).astype(int)).max() < 8


def test_a_wrong_background_is_refused_before_anything_is_read(tmp_path):
    """Otherwise it would reject every transparent picture."""
    with pytest.raises(UserError, match="background is 'whitish'") as caught:
        sharded(tmp_path / "missing", tmp_path, background="whitish")
    assert caught.value.code == 2
