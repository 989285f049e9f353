"""The data order is a function of seed and position."""

from itertools import chain

import pytest

from stages.training.sampler import GlobalBatchSampler, ShuffledStream, share_of_rank


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_any_number_of_ranks_reads_the_same_global_batches(world_size: int):
    """The slices of all ranks, concatenated, are the batches of a single rank."""
    expected = list(GlobalBatchSampler(ShuffledStream(10, seed=3), 8, range(5)))
    samplers = [
        GlobalBatchSampler(ShuffledStream(10, seed=3), 8, range(5), rank, world_size) for rank in range(world_size)
    ]
    batches = [list(chain.from_iterable(slices)) for slices in zip(*samplers, strict=True)]
    assert batches == expected


def test_each_epoch_is_another_permutation_of_all_images():
    """Every epoch contains every image once, and two epochs differ."""
    stream = ShuffledStream(20, seed=0)
    first, second = ([stream[position].image_index for position in range(start, start + 20)] for start in (0, 20))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second


def test_a_later_start_continues_the_same_stream():
    """Resuming needs only the step, also in the middle of an epoch and across its end."""
    expected = list(GlobalBatchSampler(ShuffledStream(7, seed=1), 4, range(9)))
    for start in range(9):
        sampler = GlobalBatchSampler(ShuffledStream(7, seed=1), 4, range(start, 9))
        assert list(sampler) == expected[start:]


def test_shares_differ_by_one_image_at_most():
    """Also if the number of ranks does not divide the batch."""
    for world_size in range(1, 12):
        sizes = {len(share_of_rank(11, rank, world_size)) for rank in range(world_size)}
        assert sizes <= {11 // world_size, -(-11 // world_size)}


def test_a_batch_without_an_image_for_each_rank_is_refused():
    """The message has the batch size and the number of workers."""
    with pytest.raises(ValueError, match="batch_size must be at least the 3 workers, got 2"):
        GlobalBatchSampler(ShuffledStream(20, seed=0), 2, range(1), 0, 3)
