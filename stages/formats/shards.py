"""Image shards: WebDataset tars, read by random access through an index.

    {split}-{number}.tar   per image KEY: KEY.png or KEY.jpg, KEY.cls (its class, if any), KEY.json (its origin)
    index.parquet          one row per image, one row group per shard; columns: see SCHEMA
    rejected.csv           name,reason of every file that was left out
    manifest.json          image_size, classes, counts and settings; see formats/artifact.py

Any WebDataset reader can stream the tars. Ours goes through the index instead, so that a position in a split names
one image for good, and each image is held against its hash when it is read: a damaged shard cannot lose images
quietly. Nothing here is ever unpickled.
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
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
        ("key", pa.string()),  # a number that no other image of the data set has
        ("split", pa.string()),
        ("label", pa.int32()),  # index into the classes; -1: none
        ("shard", pa.string()),  # name of the tar
        ("offset", pa.int64()),  # of the encoded image in the tar
        ("length", pa.int64()),  # in bytes
        ("sha256", pa.binary(32)),  # of the encoded image
        ("source", pa.string()),  # the file it was made from, unprintable characters escaped
    ]
)
_MADE_BY = "shard"
_KEPT_OPEN = 64  # shards per process


class Encoded(NamedTuple):
    """One encoded image on its way into a shard."""

    key: str
    data: bytes
    extension: str  # "png" or "jpg"
    label: int  # -1: none
    origin: Mapping[str, str]  # becomes KEY.json


class Row(NamedTuple):
    """One image of the index; the fields are the columns of SCHEMA, and plain JSON."""

    key: str
    split: str
    label: int
    shard: str
    offset: int
    length: int
    sha256: str  # in hex
    source: str


def write_shard(path: Path, images: Iterable[Encoded]) -> dict[str, tuple[int, int]]:
    """Write images into a new tar; return offset and length by key. Equal images give equal bytes."""
    os.environ.setdefault("WDS_SECURE", "1")  # read when webdataset is imported: no pickles, no shell commands
    from webdataset.writer import TarWriter  # imports torch, which no reader needs

    names = {}
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
                names[f"{image.key}.{image.extension}"] = image.key
        stream.flush()
        os.fsync(stream.fileno())
    with tarfile.open(path, "r:") as tar:
        return {names[member.name]: (member.offset_data, member.size) for member in tar if member.name in names}


def write_index(path: Path, shards: Iterable[list[Row]]) -> None:
    """Write the rows of each shard as one row group."""
    with pq.ParquetWriter(path, SCHEMA, compression="zstd", write_page_checksum=True) as writer:
        for rows in shards:
            columns = {name: list(column) for name, column in zip(Row._fields, zip(*rows, strict=True), strict=True)}
            columns["sha256"] = [bytes.fromhex(digest) for digest in columns["sha256"]]
            writer.write_table(pa.table(columns, schema=SCHEMA), row_group_size=len(rows))


class Part(NamedTuple):
    """One shard as a piece of work. `_asdict()` is plain JSON."""

    folder: str
    split: str
    shard: str
    image_size: int


@dataclass(frozen=True)
class ImageSet:
    """Images by position. Survives pickling, forking and threads: files open when first read, and share no position."""

    folder: Path
    image_size: int
    keys: np.ndarray  # str
    labels: np.ndarray  # int64; -1: none
    shards: tuple[str, ...]
    shard: np.ndarray  # which of `shards` holds the image
    offsets: np.ndarray
    lengths: np.ndarray
    hashes: np.ndarray  # 32 bytes each
    _open: dict[int, "_Descriptor"] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.keys)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def encoded(self, position: int) -> bytes:
        """Read an image as it lies in its shard, and hold it against its hash."""
        shard, length = int(self.shard[position]), int(self.lengths[position])
        data = self._descriptor(shard).read(length, int(self.offsets[position]))
        if hashlib.sha256(data).digest() != self.hashes[position].tobytes():
            raise UserError(
                f"Image {self.keys[position]} in {self.shards[shard]} is damaged: its bytes are not what was written.",
                where=self.folder / self.shards[shard],
                fix=f"Delete {self.folder} and run: vqvae2 run --stage {_MADE_BY}",
                code=4,
            )
        return data

    def read(self, position: int) -> np.ndarray:
        """Read an image as uint8, height x width x RGB."""
        with Image.open(io.BytesIO(self.encoded(position)), formats=("PNG", "JPEG")) as image:
            return np.asarray(image.convert("RGB"))

    def _descriptor(self, shard: int) -> "_Descriptor":
        found = self._open.get(shard)
        if found is None:
            if len(self._open) >= _KEPT_OPEN:
                self._open.clear()  # each stays open for a thread that reads it just now
            found = self._open[shard] = _Descriptor(self.folder / self.shards[shard])
        return found


class _Descriptor:
    """An open file that closes when nobody reads it any more."""

    def __init__(self, path: Path):
        try:
            self._number = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(
                f"{path.name} cannot be opened: {error.strerror}.",
                where=path.parent,
                fix=f"Run: vqvae2 run --stage {_MADE_BY}",
                code=4,
            ) from None

    def read(self, length: int, offset: int) -> bytes:
        return os.pread(self._number, length, offset)

    def __del__(self) -> None:
        if hasattr(self, "_number"):
            os.close(self._number)


@dataclass(frozen=True)
class Shards:
    """A folder of shards whose index is intact and whose files have their lengths."""

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
        """The images of train, validation or test; none if the data set has no such split."""
        assert name in SPLITS, f"{name} is not one of {SPLITS}"
        rows = self.index.filter(pc.equal(self.index["split"], name))
        return _image_set(self.artifact.folder, self.image_size, rows)

    def parts(self) -> list[Part]:
        """One part per shard, in the order of the index."""
        seen = dict.fromkeys(zip(self.index["split"].to_pylist(), self.index["shard"].to_pylist(), strict=True))
        return [Part(str(self.artifact.folder), split, shard, self.image_size) for split, shard in seen]

    def verify(self) -> None:
        """Hash every file; refuse the folder, naming the file, if one is not what was written."""
        self.artifact.verify()


def open_shards(folder: Path) -> Shards:
    """Open shards; refuse, naming it, a file that is missing, of another length, or not listed, and a damaged index."""
    found = artifact.read(folder, KIND, made_by=_MADE_BY)
    for path in sorted(folder.glob("*.tar")):
        if path.name not in found.files:
            raise UserError(
                f"{path.name} does not belong to these shards: the manifest does not list it.",
                where=folder,
                fix=f"Remove {path}",
                code=4,
            )
    found.verify(INDEX)
    index = _read_index(folder)
    ends = index.group_by("shard").aggregate(
        [("offset", "min"), ("length", "min"), ("offset", "max"), ("length", "max")]
    )
    for row in ends.to_pylist():
        size = found.files.get(row["shard"], {"bytes": 0})["bytes"]
        if min(row["offset_min"], row["length_min"]) < 0 or max(row["offset_max"], row["length_max"]) > size:
            raise UserError(
                f"{INDEX} names places that these shards do not have, in {printable(row['shard'])}.",
                where=folder,
                fix=f"Delete {folder} and run: vqvae2 run --stage {_MADE_BY}",
                code=4,
            )
    return Shards(found, index)


def read_part(part: Part) -> ImageSet:
    """The images of one shard."""
    folder = Path(part.folder)
    return _image_set(folder, part.image_size, _read_index(folder, [("shard", "=", part.shard)]))


def _read_index(folder: Path, filters: list[tuple[str, str, str]] | None = None) -> pa.Table:
    try:
        table = pq.read_table(folder / INDEX, schema=SCHEMA, filters=filters, page_checksum_verification=True)
        if gaps := [name for name in SCHEMA.names if table[name].null_count]:  # so is a column that is not there
            raise pa.ArrowInvalid(f"it lacks values of {', '.join(gaps)}")
        return table
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{INDEX} cannot be read: {error}",
            where=folder,
            fix=f"Delete {folder} and run: vqvae2 run --stage {_MADE_BY}",
            code=4,
        ) from error


def _image_set(folder: Path, image_size: int, rows: pa.Table) -> ImageSet:
    shards = rows["shard"].combine_chunks().dictionary_encode()
    hashes = np.frombuffer(b"".join(rows["sha256"].to_pylist()), np.uint8).reshape(-1, 32)
    return ImageSet(
        folder=folder,
        image_size=image_size,
        keys=np.array(rows["key"].to_pylist(), dtype=np.str_),
        labels=rows["label"].to_numpy().astype(np.int64),
        shards=tuple(shards.dictionary.to_pylist()),
        shard=shards.indices.to_numpy(),
        offsets=rows["offset"].to_numpy(),
        lengths=rows["length"].to_numpy(),
        hashes=hashes,
    )
