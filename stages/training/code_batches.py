"""Batches of codes for training and evaluating a prior, held in memory: at 2 bytes each, codes are small.

B images per rank and step, H x W codes per level.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stages.config import TrainConfig
from stages.formats.codes import Codes, CodeSet
from stages.training.distributed import DistributedContext
from stages.training.objective import TrainingData
from stages.training.sampler import GlobalBatchSampler, ShuffledStream


class CodeBatch(NamedTuple):
    """Codes of several images by level, with their labels if the dataset has classes."""

    codes: dict[str, Tensor]  # level -> (B, H, W) uint16
    labels: Tensor | None  # (B,) int64


def code_data(
    codes: Codes, levels: list[str], config: TrainConfig, *, seed: int, dist: DistributedContext
) -> TrainingData:
    """Return this rank's batches of some levels: training rows, and the evaluation splits "seen" and "validation".

    "seen" are training images without augmentation; a gap to "validation" shows overfitting.
    """
    training_set = codes.split("train", levels)
    stream = ShuffledStream(len(training_set), seed)

    def batch(split: CodeSet, rows: np.ndarray) -> CodeBatch:
        grids = {level: torch.from_numpy(split.codes[level][rows]) for level in levels}
        return CodeBatch(grids, torch.from_numpy(split.labels[rows]) if codes.classes else None)

    def training(start: int) -> Iterator[CodeBatch]:
        sampler = GlobalBatchSampler(stream, config.batch_size, range(start, config.steps), dist.rank, dist.world_size)
        for refs in sampler:
            yield batch(training_set, np.array([ref.image_index for ref in refs]))

    def evaluation(split: CodeSet) -> Iterator[CodeBatch]:
        rows = np.arange(dist.rank, min(len(split), config.evaluate_images), dist.world_size)
        for start in range(0, len(rows), config.batch_size):
            yield batch(split, rows[start : start + config.batch_size])

    plain_rows = np.flatnonzero(training_set.copies == 0)[: config.evaluate_images]
    splits = {"seen": training_set.take(plain_rows)}
    if "validation" in codes.splits:
        splits["validation"] = codes.split("validation", levels)
    return TrainingData(training, {name: partial(evaluation, split) for name, split in splits.items()})
