"""Image shards: WebDataset tars, read by random access through an index.

    {split}-{number}.tar   per image KEY: KEY.png or KEY.jpg, KEY.cls (its class, if any), KEY.json (its source file)
    index.parquet          one row per image, one row group per shard; columns: see SCHEMA
    rejected.csv           name,reason of every image file that is not used
    manifest.json          image_size, classes, counts and settings; see formats/artifact.py

Any WebDataset reader can stream the tars. `ImageSet` reads through the index instead: a position in a split is always
the same image, and each image is checked against its hash, so a damaged shard cannot silently lose images. No file is
unpickled.
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from stages.errors import UserError
from stages.formats import artifact
from stages.images.listing import SPLITS
from stages.images.sources import printable

KIND = "shards"
INDEX = "index.parquet"
REJECTED = "rejected.csv"
SCHEMA = pa.schema(
    [
        ("key", pa.string()),  # a number, unique in the dataset
        ("split", pa.string()),
        ("label", pa.int32()),  # index into the classes; -1: none
        ("shard", pa.string()),  # name of the tar
        ("offset", pa.int64()),  # of the encoded image in the tar
        ("length", pa.int64()),  # in bytes
        ("sha256", pa.binary(32)),  # of the encoded image
        ("source", pa.string()),  # name of the source file, unprintable characters escaped
    ]
)
_STAGE = "shard"
_MAX_OPEN_FILES = 64  # shards per ImageSet; far below the usual limit of 1024 descriptors per process


class EncodedImage(NamedTuple):
    """Encoded image to write to a shard."""

    key: str
    data: bytes
    extension: str  # "png" or "jpg"
    label: int  # -1: none
    origin: Mapping[str, str]  # written as KEY.json: name of the source file, and class


class IndexRow(NamedTuple):
    """Row of the index. The fields are the columns of SCHEMA, as plain JSON."""

    key: str
    split: str
    label: int
    shard: str
    offset: int
    length: int
    sha256: str  # hexadecimal
    source: str


def write_shard(path: Path, images: Iterable[EncodedImage]) -> dict[str, tuple[int, int]]:
    """Write images to a new tar; return offset and length in bytes by key. Equal images give equal bytes."""
    os.environ.setdefault("WDS_SECURE", "1")  # webdataset reads it on import: no pickles, no shell commands
    from webdataset.writer import TarWriter  # imports torch, which readers of shards do not need

    keys = {}  # tar member -> key
    with path.open("wb") as stream:
        with TarWriter(stream, encoder=False, compress=False, mtime=0.0) as writer:
            for image in images:
                members: dict[str, Any] = {
                    "__key__": image.key,
                    image.extension: image.data,
                    "json": json.dumps(image.origin, sort_keys=True).encode(),
                }
                if image.label >= 0:
                    members["cls"] = str(image.label).encode()
                writer.write(members)
                keys[f"{image.key}.{image.extension}"] = image.key
        stream.flush()
        os.fsync(stream.fileno())
    with tarfile.open(path, "r:") as tar:
        return {keys[member.name]: (member.offset_data, member.size) for member in tar if member.name in keys}


def write_index(path: Path, shards: Iterable[list[IndexRow]]) -> None:
    """Write the index, with the rows of each shard as one row group."""
    with pq.ParquetWriter(path, SCHEMA, compression="zstd", write_page_checksum=True) as writer:
        for rows in shards:
            columns = {
                name: list(column) for name, column in zip(IndexRow._fields, zip(*rows, strict=True), strict=True)
            }
            columns["sha256"] = [bytes.fromhex(digest) for digest in columns["sha256"]]
            writer.write_table(pa.table(columns, schema=SCHEMA), row_group_size=len(rows))


class ShardRef(NamedTuple):
    """Reference to one shard, as the part of a mapped stage. `_asdict()` is plain JSON."""

    folder: str
    split: str
    shard: str  # name of the tar
    image_size: int  # pixels
    row_group: int  # of the index
    images: int  # rows of the row group


@dataclass(frozen=True)
class ImageSet:
    """Random access to N images by position.

    Safe to pickle, to fork and to share between threads: files are opened on first use and read by absolute offset.
    """

    folder: Path
    image_size: int  # side in pixels
    keys: np.ndarray  # (N,) str
    labels: np.ndarray  # (N,) int64; -1: none
    shards: tuple[str, ...]  # names of the tars
    shard: np.ndarray  # (N,) index into `shards`
    offsets: np.ndarray  # (N,) bytes
    lengths: np.ndarray  # (N,) bytes
    hashes: np.ndarray  # (N, 32) uint8: SHA-256
    _open_files: dict[int, "_OpenFile"] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.keys)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open_files": {}}

    def read_encoded(self, position: int) -> bytes:
        """Read an image as encoded bytes. Raises UserError if its hash differs from the index."""
        shard, length = int(self.shard[position]), int(self.lengths[position])
        data = self._file(shard).read(length, int(self.offsets[position]))
        if hashlib.sha256(data).digest() != self.hashes[position].tobytes():
            raise UserError(
                f"Image {self.keys[position]} in {self.shards[shard]} is damaged: its hash differs from the index.",
                where=self.folder / self.shards[shard],
                fix=f"Delete {self.folder} and run: vqvae2 run --stage {_STAGE}",
                code=4,
            )
        return data

    def read(self, position: int) -> np.ndarray:
        """Read an image as (H, W, 3) uint8. Raises UserError if it is damaged."""
        with Image.open(io.BytesIO(self.read_encoded(position)), formats=("PNG", "JPEG")) as image:
            return np.asarray(image.convert("RGB"))

    def _file(self, shard: int) -> "_OpenFile":
        file = self._open_files.get(shard)
        if file is None:
            if len(self._open_files) >= _MAX_OPEN_FILES:
                self._open_files.clear()  # a thread that is reading a file holds a reference to it
            file = self._open_files[shard] = _OpenFile(self.folder / self.shards[shard])
        return file


class _OpenFile:
    """File descriptor that closes when its last reference is dropped."""

    def __init__(self, path: Path):
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(
                f"{path.name} cannot be opened: {error.strerror}.",
                where=path.parent,
                fix=f"Run: vqvae2 run --stage {_STAGE}",
                code=4,
            ) from None

    def read(self, length: int, offset: int) -> bytes:
        return os.pread(self._descriptor, length, offset)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


@dataclass(frozen=True)
class Shards:
    """Handle of a folder of shards. `open_shards` has verified the index and the file lengths."""

    artifact: artifact.Artifact
    index: pa.Table

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.artifact.meta["classes"])

    @property
    def image_size(self) -> int:
        return self.artifact.meta["image_size"]

    @property
    def digest(self) -> str:
        return self.artifact.digest

    def split(self, name: str) -> ImageSet:
        """Return the images of train, validation or test; an empty set if the dataset has no such split."""
        assert name in SPLITS, f"{name} is not one of {SPLITS}"
        rows = self.index.filter(pc.equal(self.index["split"], name))
        return _image_set(self.artifact.folder, self.image_size, rows)

    def shard_refs(self) -> list[ShardRef]:
        """Return one reference per shard, in the order of the index.

        Raises UserError if the index does not have one row group per shard.
        """
        shards = _dictionary_encode(self.index["shard"])
        numbers = shards.indices.to_numpy()
        starts = np.flatnonzero(np.diff(numbers, prepend=-1))  # rows where another shard begins
        counts = np.diff(starts, append=len(numbers)).tolist()
        names = shards.dictionary.take(pa.array(numbers[starts])).to_pylist()
        splits = self.index["split"].take(pa.array(starts)).to_pylist()
        folder = self.artifact.folder
        metadata = _read_metadata(folder)
        if counts != [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]:
            raise _index_error(folder, "must have one row group per shard.")
        return [
            ShardRef(str(folder), split, name, self.image_size, row_group, count)
            for row_group, (split, name, count) in enumerate(zip(splits, names, counts, strict=True))
        ]


def open_shards(folder: Path) -> Shards:
    """Open a folder of shards.

    Raises UserError if a file is missing, of another length or not in the manifest, or if the index is damaged.
    """
    shards_artifact = artifact.read(folder, KIND, _STAGE)
    for path in sorted(folder.glob("*.tar")):
        if path.name not in shards_artifact.files:
            raise UserError(
                f"{path.name} is not listed in the manifest of these shards.",
                where=folder,
                fix=f"Remove {path}",
                code=4,
            )
    shards_artifact.verify(INDEX)
    index = _read_index(folder)
    # The index may come from someone else: check per shard that no image is outside its tar, before any allocation.
    ranges = index.group_by("shard").aggregate(
        [("offset", "min"), ("length", "min"), ("offset", "max"), ("length", "max")]
    )
    for row in ranges.to_pylist():
        size = shards_artifact.files.get(row["shard"], {"bytes": 0})["bytes"]
        if min(row["offset_min"], row["length_min"]) < 0 or max(row["offset_max"], row["length_max"]) > size:
            raise _index_error(folder, f"lists images outside {printable(row['shard'])}, which has {size} bytes.")
    return Shards(shards_artifact, index)


def read_shard(ref: ShardRef) -> ImageSet:
    """Open the images of one shard. Raises UserError if the index is damaged."""
    folder = Path(ref.folder)
    rows = _read_index(folder, ref.row_group)
    if rows["shard"].unique().to_pylist() != [ref.shard] or len(rows) != ref.images:
        raise _index_error(folder, f"has other rows than the {ref.images} of {printable(ref.shard)}.")
    return _image_set(folder, ref.image_size, rows)


def _read_index(folder: Path, row_group: int | None = None) -> pa.Table:
    """Read the index, or one row group of it. Raises UserError if it is damaged."""
    try:
        with pq.ParquetFile(folder / INDEX, metadata=_read_metadata(folder), page_checksum_verification=True) as file:
            table = file.read() if row_group is None else file.read_row_group(row_group)
        absent = set(SCHEMA.names) - set(table.schema.names)
        if incomplete := [name for name in SCHEMA.names if name in absent or table[name].null_count]:
            raise pa.ArrowInvalid(f"it has missing values of {', '.join(incomplete)}")
        return table.select(SCHEMA.names).cast(SCHEMA)
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise _index_error(folder, f"cannot be read: {error}") from error


def _read_metadata(folder: Path) -> pq.FileMetaData:
    """Read the footer of the index, once per process while the file stays the same: it grows with the shards."""
    try:
        status = (folder / INDEX).stat()
        return _parse_metadata(folder / INDEX, (status.st_ino, status.st_size, status.st_mtime_ns))
    except (OSError, pa.ArrowException) as error:
        raise _index_error(folder, f"cannot be read: {error}") from error


@lru_cache(maxsize=4)
def _parse_metadata(path: Path, state: tuple[int, ...]) -> pq.FileMetaData:
    """Parse the footer of a file that is in this state, which only identifies the entry of the cache."""
    return pq.read_metadata(path)


def _index_error(folder: Path, problem: str) -> UserError:
    fix = f"Delete {folder} and run: vqvae2 run --stage {_STAGE}"
    return UserError(f"{INDEX} {problem}", where=folder, fix=fix, code=4)


def _image_set(folder: Path, image_size: int, rows: pa.Table) -> ImageSet:
    shards = _dictionary_encode(rows["shard"])
    return ImageSet(
        folder=folder,
        image_size=image_size,
        keys=_fixed_width(rows["key"]),
        labels=rows["label"].to_numpy().astype(np.int64),
        shards=tuple(shards.dictionary.to_pylist()),
        shard=shards.indices.to_numpy(),
        offsets=rows["offset"].to_numpy(),
        lengths=rows["length"].to_numpy(),
        hashes=_hashes(rows["sha256"]),
    )


def _dictionary_encode(column: pa.ChunkedArray) -> pa.DictionaryArray:
    """Encode strings as the index of their first occurrence."""
    return column.combine_chunks().dictionary_encode()


def _fixed_width(column: pa.ChunkedArray) -> np.ndarray:
    """Convert strings to an array of NumPy's strings, chunk by chunk: a Python object takes 60 bytes."""
    width = pc.max(pc.utf8_length(column)).as_py() or 1
    result = np.empty(len(column), dtype=f"U{width}")
    start = 0
    for chunk in column.chunks:
        result[start : start + len(chunk)] = chunk.to_pylist()
        start += len(chunk)
    return result


def _hashes(column: pa.ChunkedArray) -> np.ndarray:
    """Convert hashes to an array, (N, 32) uint8."""
    result = np.empty((len(column), 32), np.uint8)
    start = 0
    for chunk in column.chunks:
        values = np.frombuffer(chunk.buffers()[1], np.uint8).reshape(-1, 32)
        result[start : start + len(chunk)] = values[chunk.offset : chunk.offset + len(chunk)]
        start += len(chunk)
    return result
