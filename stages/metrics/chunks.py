"""Parallel computation over the rows of a matrix, whose result does not depend on the number of threads."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")
CHUNK_ROWS = 256  # fixed, because the order of sums decides the last digits


def map_chunks(function: Callable[[slice], Result], rows: int, threads: int = 0) -> Iterator[Result]:
    """Call `function` with each chunk of 0 to `rows`, on `threads` threads; yield the results in order.

    0 threads is one per processor. NumPy releases the interpreter lock in matrix products. Limit it to one thread of
    its own (`stages.metrics.threads`).
    """
    chunks = [slice(start, min(start + CHUNK_ROWS, rows)) for start in range(0, rows, CHUNK_ROWS)]
    with ThreadPoolExecutor(threads or os.cpu_count()) as executor:
        yield from executor.map(function, chunks)
