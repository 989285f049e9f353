"""Tests of shards: reading by position, and detection of damage."""

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
from stages.formats.shards import EncodedImage, IndexRow, ShardRef, open_shards, read_shard, write_index, write_shard

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), np.uint8)
SHARDS = {  # the first two have the same length, so swapping them changes no size
    "train-00000.tar": ("train", range(0, 3)),
    "train-00001.tar": ("train", range(3, 6)),
    "validation-00000.tar": ("validation", range(6, 9)),
}


def encode(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def make(folder: Path, pixels: np.ndarray = PIXELS) -> Path:
    with artifact.commit_folder(folder, shards.KIND, {"image_size": 8, "classes": ["cat", "dog"]}) as temporary:
        rows = []
        for shard, (split, numbers) in SHARDS.items():
            images = [
                EncodedImage(
                    f"{number:09d}", encode(pixels[number]), "png", number % 2, {"name": f"{number}\udcff.webp"}
                )
                for number in numbers
            ]
            locations = write_shard(temporary / shard, images)
            rows.append(
                [
                    IndexRow(
                        image.key,
                        split,
                        image.label,
                        shard,
                        *locations[image.key],
                        hashlib.sha256(image.data).hexdigest(),
                        "x",
                    )
                    for image in images
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


def test_images_are_read_by_position(folder):
    """Every pixel, key and label is equal, in the order of writing."""
    opened = open_shards(folder)
    train = opened.split("train")
    assert (len(train), len(opened.split("validation")), len(opened.split("test"))) == (6, 3, 0)
    assert train.labels.tolist() == [0, 1, 0, 1, 0, 1] and train.labels.dtype == np.int64
    assert train.keys.tolist() == [f"{number:09d}" for number in range(6)]
    assert opened.classes == ("cat", "dog") and opened.image_size == 8
    np.testing.assert_array_equal(read_all(folder), PIXELS)


def test_shard_refs_cover_the_dataset(folder):
    """Each reference is plain JSON and opens the images of one shard."""
    refs = [ShardRef(**json.loads(json.dumps(ref._asdict()))) for ref in open_shards(folder).shard_refs()]
    assert [ref.shard for ref in refs] == list(SHARDS) and refs[-1].split == "validation"
    pixels = [read_shard(ref).read(position) for ref in refs for position in range(3)]
    np.testing.assert_array_equal(np.stack(pixels), PIXELS)


def test_an_index_with_other_row_groups_is_rejected(folder):
    """A reference reads one row group, which must be its shard."""
    table = pq.read_table(folder / shards.INDEX)
    meta = {"image_size": 8, "classes": []}
    with artifact.commit_folder(folder.parent / "other", shards.KIND, meta) as other:
        for path in folder.glob("*.tar"):
            shutil.copy(path, other)
        pq.write_table(table, other / shards.INDEX, row_group_size=4, write_page_checksum=True)
    assert "one row group per shard" in refusal(open_shards(folder.parent / "other").shard_refs)


def test_a_reference_to_another_row_group_is_rejected(folder):
    """A reference of an earlier run must not read the images of another shard."""
    first, second, _ = open_shards(folder).shard_refs()
    assert "has other rows" in refusal(lambda: read_shard(first._replace(row_group=second.row_group)))
    assert "cannot be read" in refusal(lambda: read_shard(first._replace(row_group=3)))


def test_a_rewritten_index_is_read_again(folder):
    """The footer is cached for the file, not for its name."""
    open_shards(folder).shard_refs()
    shutil.rmtree(folder)
    make(folder, PIXELS[::-1])
    np.testing.assert_array_equal(read_shard(open_shards(folder).shard_refs()[0]).read(0), PIXELS[-1])


def _first(images, queue):
    queue.put(images.read(0).tobytes())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_an_image_set_can_be_sent_to_other_processes(folder, method):
    """A set with open files can be forked, spawned and pickled."""
    images = open_shards(folder).split("train")
    images.read(5)
    assert (pickle.loads(pickle.dumps(images)).read(0) == PIXELS[0]).all()
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=_first, args=(images, queue))
    process.start()
    assert queue.get(timeout=60) == PIXELS[0].tobytes()
    process.join()


def test_threads_can_share_an_image_set(folder, monkeypatch):
    """Many threads read the right images, also with fewer open files than shards."""
    monkeypatch.setattr(shards, "_MAX_OPEN_FILES", 1)
    images = open_shards(folder).split("train")
    positions = list(range(6)) * 40
    with ThreadPoolExecutor(8) as pool:
        for position, pixels in zip(positions, pool.map(images.read, positions), strict=True):
            assert (pixels == PIXELS[position]).all()


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_open_files_are_limited_and_closed(folder, monkeypatch):
    """No more files are open than allowed, and none after the set is deleted."""
    images = open_shards(folder).split("train")
    before = open_files()
    images.read(0), images.read(5)
    assert open_files() == before + 2
    monkeypatch.setattr(shards, "_MAX_OPEN_FILES", 2)
    for position in (3, 0, 4):
        images.read(position)
    assert open_files() == before + 2
    del images
    assert open_files() == before


def test_webdataset_reads_the_shards(folder):
    """The tars are plain WebDataset: key, image, class and source file."""
    import webdataset

    stream = webdataset.WebDataset([str(folder / name) for name in SHARDS], shardshuffle=False)
    samples = list(stream)
    assert [sample["__key__"] for sample in samples] == [f"{number:09d}" for number in range(9)]
    assert (np.asarray(Image.open(io.BytesIO(samples[4]["png"]))) == PIXELS[4]).all()
    assert samples[5]["cls"] == b"1" and json.loads(samples[5]["json"]) == {"name": "5\udcff.webp"}


def test_writing_twice_gives_the_same_bytes(tmp_path):
    """Equal images give equal digests."""
    assert open_shards(make(tmp_path / "a")).digest == open_shards(make(tmp_path / "b")).digest


def test_a_truncated_shard_is_rejected_on_opening(folder):
    """Truncation is detected at any offset, also between members and in the padding at the end."""
    shard = folder / "train-00001.tar"
    complete = shard.read_bytes()
    boundary = 512 * 2  # after the first member, KEY.cls: its header and its block
    for length in (0, len(complete) // 4, len(complete) // 2, len(complete) * 9 // 10, boundary, len(complete) - 1):
        shard.write_bytes(complete[:length])
        assert "train-00001.tar" in refusal(lambda: open_shards(folder))


def test_missing_and_extra_shards_are_named_on_opening(folder):
    """They are compared with the manifest."""
    shutil.copy(folder / "train-00000.tar", folder / "train-00009.tar")
    assert "train-00009.tar" in refusal(lambda: open_shards(folder))
    (folder / "train-00009.tar").unlink()
    (folder / "validation-00000.tar").unlink()
    assert "validation-00000.tar is missing" in refusal(lambda: open_shards(folder))


def test_a_shard_deleted_after_opening_is_named(folder):
    """The error has the folder and the command that restores the shard."""
    images = open_shards(folder).split("train")
    (folder / "train-00000.tar").unlink()
    message = refusal(lambda: images.read(0))
    assert "train-00000.tar cannot be opened: No such file" in message
    assert "--stage shard" in message and str(folder) in message


def test_a_flipped_bit_in_an_image_is_detected_on_reading(folder):
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
    assert "train-00001.tar" in refusal(open_shards(folder).artifact.verify)


def test_a_flipped_header_bit_loses_no_image(folder):
    """A streaming reader would stop early, the index still finds every image, and verify names the shard."""
    shard = folder / "train-00000.tar"
    data = bytearray(shard.read_bytes())
    data[1024 + 150] ^= 4  # inside the second member's header, its checksum
    shard.write_bytes(data)
    np.testing.assert_array_equal(read_all(folder), PIXELS)
    assert "train-00000.tar" in refusal(open_shards(folder).artifact.verify)


def test_swapped_and_foreign_shards_are_detected(folder, tmp_path):
    """They have the same names, lengths and counts, but other images."""
    first, second = folder / "train-00000.tar", folder / "train-00001.tar"
    original = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(original)
    opened = open_shards(folder)
    assert "train-00000.tar" in refusal(lambda: opened.split("train").read(0))
    assert "train-00000.tar" in refusal(opened.artifact.verify)
    foreign = make(tmp_path / "foreign", PIXELS[::-1].copy())
    second.write_bytes((foreign / "train-00001.tar").read_bytes())
    assert "train-00001.tar" in refusal(lambda: opened.split("train").read(3))


def test_a_damaged_index_is_rejected(folder):
    """Flipped bits and a missing file are detected before any image is read."""
    index = folder / shards.INDEX
    complete = index.read_bytes()
    generator = np.random.default_rng(1)
    for position in generator.integers(0, len(complete), 50):
        damaged = bytearray(complete)
        damaged[position] ^= 1 << int(generator.integers(0, 8))
        index.write_bytes(damaged)
        assert shards.INDEX in refusal(lambda: open_shards(folder))
    index.unlink()
    assert shards.INDEX in refusal(lambda: open_shards(folder))


@pytest.mark.parametrize("column", ["label", "offset", "shard", "sha256"])
@pytest.mark.parametrize("change", ["missing", "empty", "text"])
def test_an_index_with_an_invalid_column_is_rejected(folder, column, change):
    """A column is missing, empty or of another type, and the manifest agrees with the file."""
    table, index = pq.read_table(folder / shards.INDEX), folder / shards.INDEX
    values = {"missing": None, "empty": pa.nulls(9, table[column].type), "text": pa.array([["?"]] * 9)}[change]
    table = table.drop([column])
    pq.write_table(table if values is None else table.append_column(column, values), index)
    manifest = json.loads((folder / artifact.MANIFEST).read_text())
    manifest["files"][shards.INDEX] = {"bytes": index.stat().st_size, "sha256": artifact.sha256(index)}
    (folder / artifact.MANIFEST).write_text(json.dumps(manifest))
    message = refusal(lambda: open_shards(folder))
    assert f"{shards.INDEX} cannot be read" in message and (
        change == "text" or f"missing values of {column}" in message
    )


def test_read_shard_verifies_the_index_checksums(folder):
    """A worker reads only the index, without the hashes of the manifest."""
    ref = open_shards(folder).shard_refs()[0]
    index = folder / shards.INDEX
    data = bytearray(index.read_bytes())
    column = pq.ParquetFile(index).metadata.row_group(0).column(4)
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    data[column.data_page_offset + column.total_compressed_size - 1] ^= 1
    index.write_bytes(data)
    assert shards.INDEX in refusal(lambda: read_shard(ref))


def test_a_thousand_bit_flips_are_all_detected(folder):
    """verify names the shard each time; reading gives the original pixels or an error."""
    opened = open_shards(folder)
    shard = folder / "train-00000.tar"
    complete = shard.read_bytes()
    generator = np.random.default_rng(2)
    for position, bit in zip(generator.integers(0, len(complete), 1000), generator.integers(0, 8, 1000), strict=True):
        damaged = bytearray(complete)
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


def test_a_missing_folder_names_the_stage_that_writes_it(tmp_path):
    """The fix is a command."""
    assert "vqvae2 run --stage shard" in refusal(lambda: open_shards(tmp_path / "nothing"))


@pytest.mark.parametrize(
    "change", [{"shard": "../secret.tar"}, {"shard": "absent.tar"}, {"length": 2**60}, {"offset": -1}], ids=str
)
def test_an_index_with_locations_outside_the_shards_is_rejected(folder, change):
    """A malicious index opens no file outside the folder and allocates no memory."""
    (folder.parent / "secret.tar").write_bytes(bytes(1000))
    rows = pq.read_table(folder / shards.INDEX).to_pylist()
    index_rows = [IndexRow(**{**row, "sha256": row["sha256"].hex()}) for row in rows]
    with artifact.commit_folder(folder.parent / "hostile", shards.KIND, {"image_size": 8, "classes": []}) as hostile:
        for path in folder.glob("*.tar"):
            shutil.copy(path, hostile)
        write_index(hostile / shards.INDEX, [[index_rows[0]._replace(**change), *index_rows[1:]]])
    assert "lists images outside" in refusal(lambda: open_shards(folder.parent / "hostile"))
