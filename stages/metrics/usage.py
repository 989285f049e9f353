"""Usage: how evenly a level's codes spread over its codebook. A collapsed level leaves its prior nothing to learn.

Perplexity = exp(-sum p ln p) with p the share of positions that hold an entry: from 1 (one entry) to K (all alike).
"""

import numpy as np
import torch

from models import quantizer

COLLAPSED_BELOW = 0.25  # perplexity as a share of the entries


def count(codes: np.ndarray, entries: int) -> np.ndarray:
    """Count how often each entry occurs, `(K,)` int64. Counts add up."""
    return np.bincount(codes.ravel(), minlength=entries)


def perplexity(counts: np.ndarray) -> float:
    """Say how many evenly used entries would be as unpredictable as these counts; 0 without any codes."""
    return quantizer.perplexity(torch.from_numpy(counts)) if counts.any() else 0.0


def summarize(counts: np.ndarray) -> dict[str, float]:
    """Give the perplexity, and the number of entries that occur at all."""
    return {"perplexity": perplexity(counts), "used_entries": int((counts > 0).sum())}


def is_collapsed(counts: np.ndarray) -> bool:
    """Tell whether a level uses less of its codebook than a quarter, by perplexity."""
    return perplexity(counts) < COLLAPSED_BELOW * len(counts)
