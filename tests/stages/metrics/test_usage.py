"""Codebook usage."""

import numpy as np
import pytest

from stages.metrics import usage


def test_perplexity_of_uniform_counts_is_the_number_of_entries():
    """Four equally used entries give 4, a single entry 1, and no codes 0."""
    assert usage.perplexity(np.array([5, 5, 0, 5, 5])) == pytest.approx(4)
    assert usage.perplexity(np.array([0, 9])) == pytest.approx(1)
    assert usage.perplexity(np.array([0, 0])) == 0


def test_counts_of_parts_add_up():
    """The counts of two parts add up to the counts of all codes."""
    codes = np.random.default_rng(0).integers(0, 7, (6, 2, 2)).astype(np.uint16)
    parts = usage.count(codes[:2], 8) + usage.count(codes[2:], 8)
    assert (parts == usage.count(codes, 8)).all() and parts.sum() == 24 and len(parts) == 8


def test_level_with_perplexity_below_a_quarter_is_collapsed():
    """A level is collapsed if its perplexity is below a quarter of its entries."""
    assert usage.is_collapsed(np.array([9, 0, 0, 0, 0, 0, 0, 0]))
    assert not usage.is_collapsed(np.array([1, 1, 1, 0, 0, 0, 0, 0]))
    assert usage.summarize(np.array([1, 1, 1, 0])) == pytest.approx({"perplexity": 3, "used_entries": 3})
