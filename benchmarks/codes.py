"""Codes of a training set: time and memory until a rank can train, and the time of a batch.

    python benchmarks/codes.py

20,000 rows of 32 x 32 and 64 x 64 codes, as of ImageNet at 256 x 256 pixels, in 20 Parquet files. Each case is measured
in its own process: processor time, wall time, and the anonymous memory that it adds, which the ranks of a node do not
share. `parquet` decodes all rows into memory; `arrays` maps the arrays that the first rank of a node makes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from models.priors import Grid
from stages.formats import artifact
from stages.formats.code_arrays import CodeArrays, open_arrays, split_arrays, write_arrays
from stages.formats.codes import KIND, CodeSet, open_codes, write_codes_file
from stages.runtime.verification import mark_verified, verify_once

LEVELS = {"top": Grid(512, 32, 32), "bottom": Grid(512, 64, 64)}
BATCH_SIZE, BATCHES = 16, 200


def write(folder: Path, rows: int, files: int) -> None:
    """Write made-up codes, in which every entry is as frequent."""
    meta = {"levels": {name: grid._asdict() for name, grid in LEVELS.items()}, "classes": [], "vqvae": ""}
    generator = np.random.default_rng(0)
    with artifact.commit_folder(folder, KIND, meta) as out:
        for number, numbers in enumerate(np.array_split(np.arange(rows), files)):
            codes = {
                name: generator.integers(grid.entries, size=(len(numbers), grid.height, grid.width), dtype=np.uint16)
                for name, grid in LEVELS.items()
            }
            labels, keys = np.full(len(numbers), -1), [f"{key:09d}" for key in numbers]
            path = out / f"train-{number:05d}.parquet"
            write_codes_file(path, LEVELS, codes, labels, np.zeros(len(numbers)), keys, {})


def anonymous_bytes() -> int:
    """Return the memory of this process that is backed by no file."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))


def measure(case: str, folder: Path) -> dict[str, float]:
    """Open the codes of all levels, then read random batches."""
    codes, arrays = open_codes(folder / "codes"), folder / "arrays"
    memory, processor, wall = anonymous_bytes(), time.process_time(), time.perf_counter()
    if case == "make the arrays":
        write_arrays(codes, arrays)
        mark_verified(open_arrays(arrays, codes))
    if case == "parquet":
        rows: CodeSet | CodeArrays = codes.split("train", LEVELS)
    else:
        opened = open_arrays(arrays, codes)
        verify_once(opened)
        rows = split_arrays(opened, "train", LEVELS)
    result = {"open_s": time.process_time() - processor, "open_wall_s": time.perf_counter() - wall}
    generator = np.random.default_rng(0)
    selections = generator.integers(len(rows), size=(BATCHES, BATCH_SIZE))
    processor = time.process_time()
    for selection in selections:
        for grids in rows.codes.values():
            grids[selection]
    result["batch_ms"] = (time.process_time() - processor) / BATCHES * 1e3
    return result | {"anonymous_mb": (anonymous_bytes() - memory) / 1e6}


def main() -> None:
    """Print a line per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--files", type=int, default=20)
    parser.add_argument("--measure", nargs=2, metavar=("CASE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure[0], Path(options.measure[1]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder, "codes"), options.rows, options.files)
        print(f"{options.rows:,} rows         processor s    wall s   anonymous MB   ms per batch of {BATCH_SIZE}")
        for case in ("parquet", "make the arrays", "arrays"):
            command = [sys.executable, __file__, "--measure", case, folder]
            result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            numbers = [result[name] for name in ("open_s", "open_wall_s", "anonymous_mb", "batch_ms")]
            print(f"{case:18}{numbers[0]:15.3f}{numbers[1]:10.3f}{numbers[2]:15.1f}{numbers[3]:18.3f}")


if __name__ == "__main__":
    main()
