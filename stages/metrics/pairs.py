"""Sums over pairs of images, by their features: all that KID, precision, recall, density and coverage need.

N images have N^2 pairs, so the work is split: a call takes some images of one set (rows) and all of the other (columns)
in blocks. `join_sets` and `join_pairs` join the results of the calls. One matrix product per block serves all
metrics.

The ball of an image has the distance to its k-th nearest neighbour in its own set as its radius.

Axes: N reference images, M compared images, D features, S subset selections, R rows, C columns of one block.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from stages.metrics.chunks import map_chunks

BLOCK_COLUMNS = 4096  # images of the other set in float64 at once: 64 MiB with 2,048 features
ROWS_PER_PART = 1024  # images of one call: what an interrupted evaluation computes again
SUBSETS = 100  # random halves for a standard error; its own relative error is about 1 / sqrt(2 x 100) = 7%


class Features(Protocol):
    """Features (N, D): an array, or a file of which a slice reads the rows."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> np.ndarray: ...


class SetSums(NamedTuple):
    """Sums over the pairs of some rows of a set with all of its other images."""

    kernel_sums_as_reference: np.ndarray  # (S,): KID's kernel over the pairs of each selection of the reference
    kernel_sums_as_images: np.ndarray  # (S,): over those of each selection of the compared set, which are other halves
    squared_radii: np.ndarray  # (R,): of each row's ball; NaN with k images or fewer


class PairSums(NamedTuple):
    """Sums over the pairs of some rows of the compared set with all reference images. Additive over rows."""

    kernel_sums: np.ndarray  # (S,): KID's kernel over the pairs of each selection
    reference_balls_per_image: np.ndarray  # (R,): number of reference images whose ball contains each row
    images_per_reference_ball: np.ndarray  # (N,): number of rows in the ball of each reference image
    image_balls_per_reference: np.ndarray  # (N,): number of rows whose ball contains each reference image


class SetComparison(NamedTuple):
    """Sums over all pairs within and between two sets."""

    kernel_sums_of_reference: np.ndarray  # (S,): KID's kernel over the pairs within the reference
    kernel_sums_of_images: np.ndarray  # (S,): the same within the compared set
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

    `selected` has both results of `selections` for sets of this size: the set is selected from in either role.
    """
    row_vectors = _to_vectors(features[rows])
    row_selected = [of_role[:, rows].astype(np.float64) for of_role in selected]
    kernel_sums = np.zeros((2, 1 + SUBSETS))  # as the reference, as the compared images
    nearest = np.full((len(row_vectors.values), k + 1), np.inf)  # squared distances, not sorted
    for columns, column_vectors in _blocks(features):
        column_selected = [of_role[:, columns].astype(np.float64) for of_role in selected]

        def sum_tile(
            chunk: slice,
            column_vectors: _Vectors = column_vectors,
            column_selected: list[np.ndarray] = column_selected,
        ) -> np.ndarray:
            products = row_vectors.values[chunk] @ column_vectors.values.T
            # With the image itself, at distance 0, so index k is the k-th neighbour.
            squared = _squared_distances(row_vectors, chunk, column_vectors, products)
            candidates = np.concatenate([nearest[chunk], squared], axis=1)
            nearest[chunk] = np.partition(candidates, k, axis=1)[:, : k + 1]
            kernel = _kernel(products, features.shape[1])
            return np.stack(
                [
                    _selected_sums(of_rows[:, chunk], kernel, of_columns)
                    for of_rows, of_columns in zip(row_selected, column_selected, strict=True)
                ]
            )

        for tile_sums in map_chunks(sum_tile, len(row_vectors.values), threads):
            kernel_sums += tile_sums
    # Leave out the pairs of an image with itself.
    self_kernel = _kernel(row_vectors.squared_norms, features.shape[1])
    kernel_sums -= np.stack([of_rows @ self_kernel for of_rows in row_selected])
    squared_radii = nearest[:, k] if len(features) > k else np.full(len(nearest), np.nan)
    return SetSums(kernel_sums[0], kernel_sums[1], squared_radii)


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
    row_vectors = _to_vectors(images[rows])
    row_squared_radii, row_selected = squared_radii[1][rows, None], selected[1][:, rows].astype(np.float64)
    kernel_sums = np.zeros(1 + SUBSETS)
    reference_balls_per_image = np.zeros(len(row_vectors.values), np.int64)
    images_per_reference_ball, image_balls_per_reference = np.zeros((2, len(reference)), np.int64)
    for columns, column_vectors in _blocks(reference):
        column_squared_radii, column_selected = squared_radii[0][columns], selected[0][:, columns].astype(np.float64)

        def sum_tile(
            chunk: slice,
            column_vectors: _Vectors = column_vectors,
            column_squared_radii: np.ndarray = column_squared_radii,
            column_selected: np.ndarray = column_selected,
        ) -> tuple[np.ndarray, ...]:
            products = row_vectors.values[chunk] @ column_vectors.values.T
            squared = _squared_distances(row_vectors, chunk, column_vectors, products)
            in_reference_ball = squared <= column_squared_radii
            reference_balls_per_image[chunk] += in_reference_ball.sum(axis=1)
            in_image_ball = squared <= row_squared_radii[chunk]
            kernel = _kernel(products, reference.shape[1])
            tile_sums = _selected_sums(row_selected[:, chunk], kernel, column_selected)
            return tile_sums, in_reference_ball.sum(axis=0), in_image_ball.sum(axis=0)

        for tile_sums, tile_images, tile_balls in map_chunks(sum_tile, len(row_vectors.values), threads):
            kernel_sums += tile_sums
            images_per_reference_ball[columns] += tile_images
            image_balls_per_reference[columns] += tile_balls
    return PairSums(kernel_sums, reference_balls_per_image, images_per_reference_ball, image_balls_per_reference)


def join_sets(parts: Sequence[SetSums]) -> SetSums:
    """Put the rows of a set together, in their order."""
    return SetSums(
        np.sum([part.kernel_sums_as_reference for part in parts], axis=0),
        np.sum([part.kernel_sums_as_images for part in parts], axis=0),
        np.concatenate([part.squared_radii for part in parts]),
    )


def join_pairs(parts: Sequence[PairSums]) -> PairSums:
    """Put the rows of the compared set together, in their order."""
    return PairSums(
        np.sum([part.kernel_sums for part in parts], axis=0),
        np.concatenate([part.reference_balls_per_image for part in parts]),
        np.sum([part.images_per_reference_ball for part in parts], axis=0),
        np.sum([part.image_balls_per_reference for part in parts], axis=0),
    )


def compare(reference: Features, images: Features, *, k: int, seed: int) -> SetComparison:
    """Measure all rows of two sets in this process."""
    selected = selections(seed, len(reference), len(images))
    sets = [
        join_sets([measure_set(features, rows, (of_set, of_set), k) for rows in row_ranges(len(features))])
        for features, of_set in zip((reference, images), selected, strict=True)  # each set in its role only
    ]
    radii = [sums.squared_radii for sums in sets]
    between = [measure_pair(reference, images, rows, radii, selected) for rows in row_ranges(len(images))]
    return SetComparison(sets[0].kernel_sums_as_reference, sets[1].kernel_sums_as_images, join_pairs(between))


class _Vectors(NamedTuple):
    values: np.ndarray  # (R, D) float64
    squared_norms: np.ndarray  # (R,)


def _to_vectors(features: np.ndarray) -> _Vectors:
    values = features.astype(np.float64)
    return _Vectors(values, np.einsum("rd,rd->r", values, values))


def _blocks(features: Features) -> Iterator[tuple[slice, _Vectors]]:
    for start in range(0, len(features), BLOCK_COLUMNS):
        columns = slice(start, min(start + BLOCK_COLUMNS, len(features)))
        yield columns, _to_vectors(features[columns])


def _squared_distances(rows: _Vectors, chunk: slice, columns: _Vectors, products: np.ndarray) -> np.ndarray:
    """Compute |r - c|^2 = |r|^2 + |c|^2 - 2 r.c of the rows of a chunk and all columns: (R, C)."""
    # The norms are added first, so that rows and columns may change places. Rounding can make it slightly negative.
    return np.maximum(0, rows.squared_norms[chunk, None] + columns.squared_norms - 2 * products)


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
