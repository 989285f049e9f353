"""Shards read by position, and every way of damaging them, named."""

import hashlib
import io
import json
import multiprocessing
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from stages.errors import UserError
from stages.formats import artifact, shards
from stages.formats.shards import Encoded, Part, Row, open_shards, read_part, write_index, write_shard

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), np.uint8)
SHARDS = {  # the two of equal length can be swapped without a size giving them away
    "train-00000.tar": ("train", range(0, 3)),
    "train-00001.tar": ("train", range(3, 6)),
    "validation-00000.tar": ("validation", range(6, 9)),
}


def encoded(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def make(folder: Path, pixels: np.ndarray = PIXELS) -> Path:
    with artifact.commit_folder(folder, shards.KIND, {"image_size": 8, "classes": ["cat", "dog"]}) as temporary:
        rows = []
        for shard, (split, numbers) in SHARDS.items():
            samples = [
                Encoded(f"{number:09d}", encoded(pixels[number]), "png", number % 2, {"name": f"{number}\udcff.webp"})
                for number in numbers
            ]
            places = write_shard(temporary / shard, samples)
            rows.append(
                [
                    Row(s.key, split, s.label, shard, *places[s.key], hashlib.sha256(s.data).hexdigest(), "x")
                    for s in samples
                ]
            )
        write_index(temporary / shards.INDEX, rows)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path / "shards")


def refusal(action) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert caught.value.fix and caught.value.where
    return str(caught.value)


def read_all(folder: Path) -> np.ndarray:
    opened = open_shards(folder)
    sets = [opened.split(name) for name in ("train", "validation", "test")]
    return np.stack([images.read(position) for images in sets for position in range(len(images))])


def test_images_come_back_by_position(folder):
    """Every pixel, key and label, in the order they were written."""
    opened = open_shards(folder)
    train = opened.split("train")
    assert (len(train), len(opened.split("validation")), len(opened.split("test"))) == (6, 3, 0)
    assert train.labels.tolist() == [0, 1, 0, 1, 0, 1] and train.labels.dtype == np.int64
    assert train.keys.tolist() == [f"{number:09d}" for number in range(6)]
    assert opened.classes == ("cat", "dog") and opened.image_size == 8
    np.testing.assert_array_equal(read_all(folder), PIXELS)


def test_parts_cover_the_split_shard_by_shard(folder):
    """Each part is plain JSON and reads as the images of one shard."""
    parts = [Part(**json.loads(json.dumps(part._asdict()))) for part in open_shards(folder).parts()]
    assert [part.shard for part in parts] == list(SHARDS) and [part.split for part in parts][-1] == "validation"
    again = [read_part(part).read(position) for part in parts for position in range(3)]
    np.testing.assert_array_equal(np.stack(again), PIXELS)


def _first(images, queue):
    queue.put(images.read(0).tobytes())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_an_image_set_crosses_processes(folder, method):
    """A set that has files open can be forked, spawned and pickled."""
    images = open_shards(folder).split("train")
    images.read(5)
    assert (pickle.loads(pickle.dumps(images)).read(0) == PIXELS[0]).all()
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=_first, args=(images, queue))
    process.start()
    assert queue.get(timeout=60) == PIXELS[0].tobytes()
    process.join()


def test_threads_share_an_image_set(folder, monkeypatch):
    """Many threads, and more shards than files kept open, still read the right images."""
    monkeypatch.setattr(shards, "_KEPT_OPEN", 1)
    images = open_shards(folder).split("train")
    positions = list(range(6)) * 40
    with ThreadPoolExecutor(8) as pool:
        for position, pixels in zip(positions, pool.map(images.read, positions), strict=True):
            assert (pixels == PIXELS[position]).all()


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_open_files_close_with_the_set(folder, monkeypatch):
    """No more files are open than allowed, and none when the set is gone."""
    images = open_shards(folder).split("train")
    before = open_files()
    images.read(0), images.read(5)
    assert open_files() == before + 2
    monkeypatch.setattr(shards, "_KEPT_OPEN", 2)
    for position in (3, 0, 4):
        images.read(position)
    assert open_files() == before + 2
    del images
    assert open_files() == before


def test_webdataset_streams_the_same_shards(folder):
    """The tars are plain WebDataset: key, image, class and origin."""
    import webdataset

    stream = webdataset.WebDataset([str(folder / name) for name in SHARDS], shardshuffle=False)
    samples = list(stream)
    assert [sample["__key__"] for sample in samples] == [f"{number:09d}" for number in range(9)]
    assert (np.asarray(Image.open(io.BytesIO(samples[4]["png"]))) == PIXELS[4]).all()
    assert samples[5]["cls"] == b"1" and json.loads(samples[5]["json"]) == {"name": "5\udcff.webp"}


def test_writing_twice_gives_the_same_bytes(tmp_path):
    """Equal images, equal digest."""
    assert open_shards(make(tmp_path / "a")).digest == open_shards(make(tmp_path / "b")).digest


def test_a_shard_of_another_length_is_named_when_opened(folder):
    """Truncation anywhere, also between two members and in the end padding, and an empty file."""
    shard = folder / "train-00001.tar"
    whole = shard.read_bytes()
    boundary = 512 * 2  # after the first member, KEY.cls: its header and its block
    for length in (0, len(whole) // 4, len(whole) // 2, len(whole) * 9 // 10, boundary, len(whole) - 1):
        shard.write_bytes(whole[:length])
        assert "train-00001.tar" in refusal(lambda: open_shards(folder))


def test_missing_and_extra_shards_are_named_when_opened(folder):
    """The manifest says which files there are."""
    shutil.copy(folder / "train-00000.tar", folder / "train-00009.tar")
    assert "train-00009.tar" in refusal(lambda: open_shards(folder))
    (folder / "train-00009.tar").unlink()
    (folder / "validation-00000.tar").unlink()
    assert "validation-00000.tar is missing" in refusal(lambda: open_shards(folder))


def test_a_shard_that_goes_while_it_is_read_is_named(folder):
    """With its folder, and the command that brings it back."""
    images = open_shards(folder).split("train")
    (folder / "train-00000.tar").unlink()
    said = refusal(lambda: images.read(0))
    assert "train-00000.tar cannot be opened: No such file" in said and "--stage shard" in said and str(folder) in said


def test_a_flipped_payload_bit_is_found_when_read(folder):
    """The error names shard, key and fix; the other images stay readable."""
    shard = folder / "train-00001.tar"
    data = bytearray(shard.read_bytes())
    images = open_shards(folder).split("train")
    data[images.offsets[4] + 60] ^= 1
    shard.write_bytes(data)
    images = open_shards(folder).split("train")
    message = refusal(lambda: images.read(4))
    assert "000000004" in message and "train-00001.tar" in message and "vqvae2 run --stage shard" in message
    assert (images.read(3) == PIXELS[3]).all() and (images.read(5) == PIXELS[5]).all()
    assert "train-00001.tar" in refusal(open_shards(folder).verify)


def test_a_flipped_header_bit_loses_nothing(folder):
    """Where a streaming reader ends early, the index still finds every image; verify names the shard."""
    shard = folder / "train-00000.tar"
    data = bytearray(shard.read_bytes())
    data[1024 + 150] ^= 4  # inside the second member's header, its checksum
    shard.write_bytes(data)
    np.testing.assert_array_equal(read_all(folder), PIXELS)
    assert "train-00000.tar" in refusal(open_shards(folder).verify)


def test_swapped_and_foreign_shards_are_found(folder, tmp_path):
    """Same names, same lengths, same counts; other images."""
    one, two = folder / "train-00000.tar", folder / "train-00001.tar"
    original = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(original)
    opened = open_shards(folder)
    assert "train-00000.tar" in refusal(lambda: opened.split("train").read(0))
    assert "train-00000.tar" in refusal(opened.verify)
    foreign = make(tmp_path / "foreign", PIXELS[::-1].copy())
    two.write_bytes((foreign / "train-00001.tar").read_bytes())
    assert "train-00001.tar" in refusal(lambda: opened.split("train").read(3))


def test_a_damaged_index_is_refused(folder):
    """Flipped, random and missing: named before any image is read, and never guessed."""
    index = folder / shards.INDEX
    whole = index.read_bytes()
    generator = np.random.default_rng(1)
    for position in generator.integers(0, len(whole), 50):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(generator.integers(0, 8))
        index.write_bytes(damaged)
        assert shards.INDEX in refusal(lambda: open_shards(folder))
    index.unlink()
    assert shards.INDEX in refusal(lambda: open_shards(folder))


@pytest.mark.parametrize("column", ["label", "offset", "shard", "sha256"])
@pytest.mark.parametrize("way", ["gone", "empty", "text"])
def test_an_index_of_another_shape_is_refused(folder, column, way):
    """A column that is not there, or holds nothing or something else, in an index that its manifest agrees with."""
    table, index = pq.read_table(folder / shards.INDEX), folder / shards.INDEX
    values = {"gone": None, "empty": pa.nulls(9, table[column].type), "text": pa.array([["?"]] * 9)}[way]
    table = table.drop([column])
    pq.write_table(table if values is None else table.append_column(column, values), index)
    manifest = json.loads((folder / artifact.MANIFEST).read_text())
    manifest["files"][shards.INDEX] = {"bytes": index.stat().st_size, "sha256": artifact.sha256(index)}
    (folder / artifact.MANIFEST).write_text(json.dumps(manifest))
    message = refusal(lambda: open_shards(folder))
    assert f"{shards.INDEX} cannot be read" in message and (way == "text" or f"lacks values of {column}" in message)


def test_the_index_has_page_checksums(folder):
    """A part reads the index alone, and finds flipped values by these."""
    part = open_shards(folder).parts()[0]
    index = folder / shards.INDEX
    data = bytearray(index.read_bytes())
    column = pq.ParquetFile(index).metadata.row_group(0).column(4)
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    data[column.data_page_offset + column.total_compressed_size - 1] ^= 1
    index.write_bytes(data)
    assert shards.INDEX in refusal(lambda: read_part(part))


def test_a_thousand_bit_flips_are_all_found(folder):
    """verify names the shard each time; reading gives the written pixels or an error, never others."""
    opened = open_shards(folder)
    shard = folder / "train-00000.tar"
    whole = shard.read_bytes()
    generator = np.random.default_rng(2)
    for position, bit in zip(generator.integers(0, len(whole), 1000), generator.integers(0, 8, 1000), strict=True):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(bit)
        shard.write_bytes(damaged)
        with pytest.raises(UserError, match=r"train-00000\.tar"):
            opened.artifact.verify("train-00000.tar")
        images = opened.split("train")
        for number in range(3):
            inside = images.offsets[number] <= position < images.offsets[number] + images.lengths[number]
            if inside:
                with pytest.raises(UserError, match=images.keys[number]):
                    images.read(number)
            else:
                assert (images.read(number) == PIXELS[number]).all()


def test_a_missing_folder_names_the_stage_that_makes_it(tmp_path):
    """The fix is a command."""
    assert "vqvae2 run --stage shard" in refusal(lambda: open_shards(tmp_path / "nothing"))


@pytest.mark.parametrize(
    "change", [{"shard": "../secret.tar"}, {"shard": "absent.tar"}, {"length": 2**60}, {"offset": -1}], ids=str
)
def test_an_index_that_leads_elsewhere_is_refused(folder, change):
    """No file outside is opened, and no memory is taken, for an index that somebody else has made."""
    (folder.parent / "secret.tar").write_bytes(bytes(1000))
    rows = pq.read_table(folder / shards.INDEX).to_pylist()
    made = [Row(**{**row, "sha256": row["sha256"].hex()}) for row in rows]
    with artifact.commit_folder(folder.parent / "hostile", shards.KIND, {"image_size": 8, "classes": []}) as hostile:
        for path in folder.glob("*.tar"):
            shutil.copy(path, hostile)
        write_index(hostile / shards.INDEX, [[made[0]._replace(**change), *made[1:]]])
    assert "names places that these shards do not have" in refusal(lambda: open_shards(folder.parent / "hostile"))
