"""Codebook usage: how evenly codes use the entries. A collapsed level leaves its prior little to learn.

Perplexity = exp(-sum p ln p), where p is the relative frequency of an entry. It ranges from 1 (one entry is used) to K
(all entries are used equally).

Axes: K codebook entries.
"""

import numpy as np
import torch

from models import quantizer

COLLAPSED_BELOW = 0.25  # perplexity / K; a rule of thumb, reported and never enforced


def count(codes: np.ndarray, entries: int) -> np.ndarray:
    """Count the occurrences of each entry: codes of any shape -> (K,) int64. Additive over parts."""
    return np.bincount(codes.ravel(), minlength=entries)


def perplexity(counts: np.ndarray) -> float:
    """Compute the perplexity of counts (K,); 0 if all are 0."""
    return quantizer.perplexity(torch.from_numpy(counts)) if counts.any() else 0.0


def summarize(counts: np.ndarray) -> dict[str, float]:
    """Compute the perplexity, and the number of entries used at least once, of counts (K,)."""
    return {"perplexity": perplexity(counts), "used_entries": int((counts > 0).sum())}


def is_collapsed(counts: np.ndarray) -> bool:
    """Return whether the perplexity is below COLLAPSED_BELOW of the number of entries."""
    return perplexity(counts) < COLLAPSED_BELOW * len(counts)
