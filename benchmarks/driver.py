"""Work of the driver, the process that starts the workers, on a data set of real size.

    python benchmarks/driver.py --images 1000000

Made-up data: names, an index of shards, and a compressed tar; no images are trained on. Each case runs in a process of
its own, which prints its processor time and the largest memory it has used, with that of Python and the libraries.

`list` lists the names of a source and plans the shards, `index` opens the shards and describes the parts of `codes`,
`footers` is the loop that `index` replaces: it reads the index again for each shard (10 shards are timed, and their
time is multiplied). `evaluate` describes the parts of an evaluation. `tar.gz` writes shards of a compressed tar, and of
one of twice the size.
"""

import argparse
import hashlib
import io
import json
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from stages import shard
from stages.codes import _parts
from stages.config import CodesConfig, DatasetConfig
from stages.formats import artifact
from stages.formats.shards import INDEX, KIND, SCHEMA, IndexRow, open_shards, write_index
from stages.images.compressed_tar import decompress
from stages.images.listing import _list, list_images
from stages.images.sources import Member, Source

IMAGES_PER_SHARD = 1000
TIMED_FOOTERS = 10
CASES = ("list", "index", "footers", "evaluate")


class NamesOnly:
    """Source of made-up names in 1,000 class folders."""

    messages = ()

    def __init__(self, count: int):
        self.count = count

    def members(self) -> Iterator[Member]:
        """Yield the names."""
        return (Member(f"train/n{number % 1000:08d}/{number}.JPEG", 0, 110_000) for number in range(self.count))


def write_shards(folder: Path, count: int) -> None:
    """Write an index of empty shards."""

    def rows(start: int) -> list[IndexRow]:
        name = f"train-{start // IMAGES_PER_SHARD:05d}.tar"
        return [
            IndexRow(
                f"{number:09d}", "train", number % 1000, name, 0, 0,
                hashlib.sha256(b"%d" % number).hexdigest(), f"train/n{number % 1000:08d}/{number}.JPEG",
            )
            for number in range(start, min(start + IMAGES_PER_SHARD, count))
        ]  # fmt: skip

    starts = range(0, count, IMAGES_PER_SHARD)
    with artifact.commit_folder(folder, KIND, {"image_size": 256, "classes": []}) as out:
        for number in range(len(starts)):
            (out / f"train-{number:05d}.tar").touch()
        write_index(out / INDEX, map(rows, starts))


def measure(case: str, folder: Path, count: int) -> dict[str, float]:
    """Run a case; return processor seconds and megabytes."""
    dataset = DatasetConfig("names", "names", 256, images_per_shard=IMAGES_PER_SHARD)
    start = time.process_time()
    factor = 1.0
    if case == "list":
        source = NamesOnly(count)
        listing = _list(cast(Source, source), list(source.members()), folder, "folders", 0.0)
        shard._plan(listing, dataset, folder / "plan")
    elif case == "footers":
        shards = [path.name for path in sorted((folder / "shards").glob("*.tar"))]
        start, factor = time.process_time(), len(shards) / TIMED_FOOTERS
        for name in shards[:TIMED_FOOTERS]:
            len(pq.read_table(folder / "shards" / INDEX, schema=SCHEMA, filters=[("shard", "=", name)]))
    else:
        images = open_shards(folder / "shards")
        opened, start = time.process_time() - start, time.process_time()
        if case == "index":
            print(f"  (opening the index: {opened:.2f} s)", file=sys.stderr)
            _parts(images, CodesConfig())
        else:
            len(images.split("train"))
    seconds = (time.process_time() - start) * factor
    return {"seconds": seconds, "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def write_tar(path: Path, count: int) -> None:
    """Write a compressed tar of small images, each followed by incompressible bytes."""
    generator = np.random.default_rng(0)
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for number in range(count):
            buffer = io.BytesIO()
            Image.fromarray(generator.integers(0, 256, (8, 8, 3), np.uint8)).save(buffer, "PNG")
            data = buffer.getvalue() + generator.bytes(40_000)
            info = tarfile.TarInfo(f"{number:06d}.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def shard_tar(path: Path, work: Path, *, use_decompressed: bool) -> float:
    """Write all shards of a tar in this process; return processor seconds."""
    dataset = DatasetConfig("tar", str(path), 8, images_per_shard=100)
    start = time.process_time()
    decompressed = decompress(path, work / "source.tar", lambda text: None) if use_decompressed else None
    listing = list_images(path, "none", validation_fraction=0.0, decompressed=decompressed)
    write = shard.WriteShard(path, work, dataset, decompressed)
    for part in shard._plan(listing, dataset, work):
        write(part)
    return time.process_time() - start


def main() -> None:
    """Print a line per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--tar-images", type=int, default=2000)
    parser.add_argument("--measure", nargs=2, metavar=("CASE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure[0], Path(options.measure[1]), options.images)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder, "shards"), options.images)
        print(f"{options.images:,} images\n{'':12}{'processor s':>12}{'MB':>8}")
        for case in CASES:
            command = [sys.executable, __file__, "--images", str(options.images), "--measure", case, folder]
            result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            print(f"{case:12}{result['seconds']:12.2f}{result['megabytes']:8.0f}")
        print(f"\n{'tar.gz':12}{options.tar_images:>9,} images{2 * options.tar_images:>9,} images   ratio")
        counts = (options.tar_images, 2 * options.tar_images)
        for count in counts:
            write_tar(Path(folder, f"{count}.tar.gz"), count)
        for name, use_decompressed in (("ours", True), ("streamed", False)):
            seconds = [
                shard_tar(
                    Path(folder, f"{count}.tar.gz"), Path(folder, f"{name}-{count}"), use_decompressed=use_decompressed
                )
                for count in counts
            ]
            print(f"{name:12}{seconds[0]:14.1f} s{seconds[1]:14.1f} s{seconds[1] / seconds[0]:8.2f}")


if __name__ == "__main__":
    main()
