"""The order of images is a function of seed and position."""

from itertools import chain

import pytest

from stages.training.sampler import GlobalBatchSampler, ShuffledStream


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_any_number_of_workers_sees_the_same_global_batches(workers: int):
    """The workers' slices, put side by side, are the batch that one worker would see."""
    alone = list(GlobalBatchSampler(ShuffledStream(10, seed=3), 8, start=0, stop=5, rank=0, workers=1))
    apart = [
        GlobalBatchSampler(ShuffledStream(10, seed=3), 8, start=0, stop=5, rank=rank, workers=workers)
        for rank in range(workers)
    ]
    together = [list(chain.from_iterable(slices)) for slices in zip(*apart, strict=True)]
    assert together == alone


def test_each_epoch_shows_every_image_once_in_an_order_of_its_own():
    """Epochs are permutations, and differ."""
    order = ShuffledStream(20, seed=0)
    first, second = ([order[position].image for position in range(start, start + 20)] for start in (0, 20))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second


def test_starting_later_yields_what_an_unbroken_stream_yields_from_there():
    """Resuming needs the step alone, also in the middle of an epoch and across its end."""
    unbroken = list(GlobalBatchSampler(ShuffledStream(7, seed=1), 4, start=0, stop=9, rank=0, workers=1))
    for start in range(9):
        assert (
            list(GlobalBatchSampler(ShuffledStream(7, seed=1), 4, start=start, stop=9, rank=0, workers=1))
            == unbroken[start:]
        )


def test_a_batch_that_workers_cannot_share_is_refused_with_the_fix():
    """The message holds the batch size, the workers, and what would do."""
    with pytest.raises(ValueError, match="batch_size is 9, which 2 workers cannot share evenly; use a multiple of 2"):
        GlobalBatchSampler(ShuffledStream(20, seed=0), 9, start=0, stop=1, rank=0, workers=2)
