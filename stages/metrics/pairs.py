"""Sums over the pairs of images of two sets, by their features: all that KID, precision, recall, density and coverage
need of them.

N images have N^2 pairs, so the work is split by rows: a call takes some rows of one set and all images of the other, in
blocks. `join_sets` and `join_pairs` put the rows together again. One matrix product of a block serves all metrics.

The ball of an image has the distance to its k-th nearest neighbour in its own set as its radius.

Axes: N reference images, M compared images, D features, S subset selections, R rows, C columns of one block.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from stages.metrics.chunks import map_chunks

BLOCK_COLUMNS = 4096  # of the other set, in float64 at once: 64 MiB of 2,048 features
ROWS_PER_PART = 1024  # of one call: what an interrupted evaluation computes again
SUBSETS = 100  # random halves for a standard error; its own relative error is about 1 / sqrt(2 x 100) = 7%


class Features(Protocol):
    """Features (N, D): an array, or a file of which a slice reads the rows."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> np.ndarray: ...


class SetSums(NamedTuple):
    """Sums over the pairs of some rows of a set with all of its other images."""

    kernels: np.ndarray  # (2, S): of KID's kernel over the pairs of each selection, in the roles of a pair's two sets
    squared_radii: np.ndarray  # (R,): of each row's ball; NaN with k images or fewer


class PairSums(NamedTuple):
    """Sums over the pairs of some rows of the compared set with all reference images. Additive over rows."""

    kernel: np.ndarray  # (S,): of KID's kernel over the pairs of each selection
    balls_around_image: np.ndarray  # (R,): number of reference balls that hold each row
    images_in_ball: np.ndarray  # (N,): number of rows in each reference ball
    balls_around_reference: np.ndarray  # (N,): number of balls of rows that hold each reference image


class SetComparison(NamedTuple):
    """Sums over all pairs within and between two sets."""

    within_reference: np.ndarray  # (S,) sums of KID's kernel
    within_images: np.ndarray  # (S,)
    between: PairSums


def selections(seed: int, num_reference: int, num_images: int) -> tuple[np.ndarray, np.ndarray]:
    """Select images of two sets for KID and its standard error: (S, N) and (S, M) with S = 1 + SUBSETS.

    Selection 0 has all images; each of the others has a random half of both sets.
    """
    generator = np.random.default_rng(seed)
    return _halves(num_reference, generator), _halves(num_images, generator)


def row_ranges(rows: int) -> list[slice]:
    """Split rows into the ranges that one call takes."""
    return [slice(start, min(start + ROWS_PER_PART, rows)) for start in range(0, rows, ROWS_PER_PART)]


def measure_set(features: Features, rows: slice, selected: Sequence[np.ndarray], k: int, threads: int = 0) -> SetSums:
    """Sum over the pairs of `rows` of a set with all of its other images.

    `selected` has both results of `selections`, for sets of this size.
    """
    left = _prepare(features[rows])
    row_selected = [of_set[:, rows].astype(np.float64) for of_set in selected]
    kernels = np.zeros((2, 1 + SUBSETS))
    smallest = np.full((len(left.values), k + 1), np.inf)
    for columns, right in _blocks(features):
        column_selected = [of_set[:, columns].astype(np.float64) for of_set in selected]

        def tile(chunk: slice, right: _Rows = right, column_selected: list[np.ndarray] = column_selected) -> np.ndarray:
            products = left.values[chunk] @ right.values.T
            # With the image itself, at distance 0, so index k is the k-th neighbour.
            candidates = np.concatenate([smallest[chunk], _squared_distances(left, chunk, right, products)], axis=1)
            smallest[chunk] = np.partition(candidates, k, axis=1)[:, : k + 1]
            kernel = _kernel(products, features.shape[1])
            return np.stack(
                [
                    _selected_sums(of_rows[:, chunk], kernel, of_columns)
                    for of_rows, of_columns in zip(row_selected, column_selected, strict=True)
                ]
            )

        for sums in map_chunks(tile, len(left.values), threads):
            kernels += sums
    # Leave out the pairs of an image with itself.
    kernels -= np.stack([of_rows @ _kernel(left.norms, features.shape[1]) for of_rows in row_selected])
    return SetSums(kernels, smallest[:, k] if len(features) > k else np.full(len(smallest), np.nan))


def measure_pair(
    reference: Features,
    images: Features,
    rows: slice,
    squared_radii: Sequence[np.ndarray],
    selected: Sequence[np.ndarray],
    threads: int = 0,
) -> PairSums:
    """Sum over the pairs of `rows` of the images with all reference images.

    `squared_radii` has those of the reference, (N,), and of the images, (M,); `selected` the results of `selections`.
    """
    left = _prepare(images[rows])
    row_radii, row_selected = squared_radii[1][rows, None], selected[1][:, rows].astype(np.float64)
    kernel_sums = np.zeros(1 + SUBSETS)
    balls_around_image = np.zeros(len(left.values), np.int64)
    images_in_ball, balls_around_reference = np.zeros((2, len(reference)), np.int64)
    for columns, right in _blocks(reference):
        column_radii, column_selected = squared_radii[0][columns], selected[0][:, columns].astype(np.float64)

        def tile(
            chunk: slice,
            right: _Rows = right,
            column_radii: np.ndarray = column_radii,
            column_selected: np.ndarray = column_selected,
        ) -> tuple[np.ndarray, ...]:
            products = left.values[chunk] @ right.values.T
            squared = _squared_distances(left, chunk, right, products)
            in_reference_ball = squared <= column_radii
            balls_around_image[chunk] += in_reference_ball.sum(axis=1)
            in_image_ball = squared <= row_radii[chunk]
            kernel = _kernel(products, reference.shape[1])
            sums = _selected_sums(row_selected[:, chunk], kernel, column_selected)
            return sums, in_reference_ball.sum(axis=0), in_image_ball.sum(axis=0)

        for sums, in_ball, around_reference in map_chunks(tile, len(left.values), threads):
            kernel_sums += sums
            images_in_ball[columns] += in_ball
            balls_around_reference[columns] += around_reference
    return PairSums(kernel_sums, balls_around_image, images_in_ball, balls_around_reference)


def join_sets(parts: Sequence[SetSums]) -> SetSums:
    """Put the rows of a set together, in their order."""
    return SetSums(
        np.sum([part.kernels for part in parts], axis=0), np.concatenate([part.squared_radii for part in parts])
    )


def join_pairs(parts: Sequence[PairSums]) -> PairSums:
    """Put the rows of the compared set together, in their order."""
    return PairSums(
        np.sum([part.kernel for part in parts], axis=0),
        np.concatenate([part.balls_around_image for part in parts]),
        np.sum([part.images_in_ball for part in parts], axis=0),
        np.sum([part.balls_around_reference for part in parts], axis=0),
    )


def compare(reference: Features, images: Features, *, k: int, seed: int) -> SetComparison:
    """Measure all rows of two sets in this process."""
    selected = selections(seed, len(reference), len(images))
    sets = [
        join_sets([measure_set(features, rows, (of_set, of_set), k) for rows in row_ranges(len(features))])
        for features, of_set in zip((reference, images), selected, strict=True)
    ]
    radii = [sums.squared_radii for sums in sets]
    between = [measure_pair(reference, images, rows, radii, selected) for rows in row_ranges(len(images))]
    return SetComparison(sets[0].kernels[0], sets[1].kernels[1], join_pairs(between))


class _Rows(NamedTuple):
    values: np.ndarray  # (R, D) float64
    norms: np.ndarray  # (R,): squared


def _prepare(features: np.ndarray) -> _Rows:
    values = features.astype(np.float64)
    return _Rows(values, np.einsum("rd,rd->r", values, values))


def _blocks(features: Features) -> Iterator[tuple[slice, _Rows]]:
    for start in range(0, len(features), BLOCK_COLUMNS):
        columns = slice(start, min(start + BLOCK_COLUMNS, len(features)))
        yield columns, _prepare(features[columns])


def _squared_distances(left: _Rows, chunk: slice, right: _Rows, products: np.ndarray) -> np.ndarray:
    """Compute |l - r|^2 = |l|^2 + |r|^2 - 2 l.r: (R, C)."""
    # The norms are added first, so that rows and columns may change places. Rounding can make it slightly negative.
    return np.maximum(0, left.norms[chunk, None] + right.norms - 2 * products)


def _kernel(products: np.ndarray, size: int) -> np.ndarray:
    """Compute KID's kernel (x . y / D + 1)^3 from the products x . y of vectors of D = `size` numbers."""
    base = products / size + 1
    return base * base * base  # NumPy's power takes several times longer


def _selected_sums(row_selected: np.ndarray, kernel: np.ndarray, column_selected: np.ndarray) -> np.ndarray:
    """Sum the kernel (R, C) over the pairs of each selection, indicators (S, R) and (S, C): (S,)."""
    return ((row_selected @ kernel) * column_selected).sum(axis=1)


def _halves(count: int, generator: np.random.Generator) -> np.ndarray:
    """Return indicators of the selected images, (1 + SUBSETS, count): all images, then random halves."""
    selected = np.zeros((1 + SUBSETS, count), bool)
    selected[0] = True
    for half in selected[1:]:
        half[generator.permutation(count)[: count // 2]] = True
    return selected
