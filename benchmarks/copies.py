"""How much samples copy training images: the share of a sample's codes that one training image has too.

    python benchmarks/copies.py artifacts

Compares the coarsest codes of the samples of a finished run with those of every training row, augmented copies
included, and prints the share of positions with equal codes in the most similar row. Validation images, which are no
copies, are the yardstick: samples of a prior that knows its training images by heart share more than they.

Axes: N images or rows, P codes of an image.
"""

import argparse
from pathlib import Path

import numpy as np

from stages.errors import UserError
from stages.formats.codes import open_codes
from stages.formats.samples import open_samples

NEARLY_ALL = 0.9  # of the codes: a copy with a few changes


def largest_shares(codes: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the share of equal codes in the most similar row, (N,), of codes (N, P) among rows (M, P)."""
    return np.array([(rows == image).mean(axis=1).max() for image in codes])


def main() -> None:
    """Print a row for the samples and one for the validation images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", type=Path, help="folder with codes and samples")
    options = parser.parse_args()
    try:
        codes, samples = open_codes(options.artifacts / "codes"), open_samples(options.artifacts / "samples")
        level = next(iter(codes.levels))
        rows = codes.split("train", [level]).codes[level]
        sets = {"samples": samples.codes.codes[level], "validation": codes.split("validation").originals().codes[level]}
    except UserError as error:
        parser.error(str(error))
    rows = rows.reshape(len(rows), -1)
    print(f"{rows.shape[1]} codes of level {level}, shared with the most similar of {len(rows):,} training rows")
    print(f"{'':12}{'images':>8}{'median':>9}{'90 % have at most':>19}{'share at least 90 %':>21}")
    for name, images in sets.items():
        shares = largest_shares(images.reshape(len(images), -1), rows)
        print(
            f"{name:12}{len(images):8}{np.median(shares):9.2f}{np.quantile(shares, 0.9):19.2f}"
            f"{np.mean(shares >= NEARLY_ALL):21.3f}"
        )


if __name__ == "__main__":
    main()
