"""Codebook usage."""

import numpy as np
import pytest

from stages.metrics import usage


def test_perplexity_counts_evenly_used_entries():
    """Four entries used alike are four, one is one, and none is zero."""
    assert usage.perplexity(np.array([5, 5, 0, 5, 5])) == pytest.approx(4)
    assert usage.perplexity(np.array([0, 9])) == pytest.approx(1)
    assert usage.perplexity(np.array([0, 0])) == 0


def test_counts_of_parts_add_up():
    """Counting two halves is counting the whole."""
    codes = np.random.default_rng(0).integers(0, 7, (6, 2, 2)).astype(np.uint16)
    parts = usage.count(codes[:2], 8) + usage.count(codes[2:], 8)
    assert (parts == usage.count(codes, 8)).all() and parts.sum() == 24 and len(parts) == 8


def test_a_level_that_uses_one_entry_is_collapsed():
    """Below a quarter of the entries a level is called collapsed, and its numbers say how far."""
    assert usage.is_collapsed(np.array([9, 0, 0, 0, 0, 0, 0, 0]))
    assert not usage.is_collapsed(np.array([1, 1, 1, 0, 0, 0, 0, 0]))
    assert usage.summarize(np.array([1, 1, 1, 0])) == pytest.approx({"perplexity": 3, "used_entries": 3})
