"""Number of threads of numerical libraries, which decides the order of sums and so the last digits of results."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_thread() -> Iterator[None]:
    """Run BLAS, OpenMP and PyTorch on one thread inside the block.

    Results then depend neither on the number of processors nor on variables such as OMP_NUM_THREADS.
    """
    import torch
    from threadpoolctl import threadpool_limits

    threads = torch.get_num_threads()
    with threadpool_limits(1):
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
