"""Batches of codes for training and evaluating a prior, read from arrays that the ranks of a node share.

B images per rank and step, H x W codes per level.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stages.config import TrainConfig
from stages.formats.code_arrays import CodeArrays
from stages.formats.codes import Codes
from stages.runtime.context import StageContext
from stages.training.distributed import DistributedContext
from stages.training.objective import TrainingData
from stages.training.sampler import GlobalBatchSampler, ShuffledStream
from stages.training.shared_codes import SharedCodes


class CodeBatch(NamedTuple):
    """Codes of several images by level, with their labels if the dataset has classes."""

    codes: dict[str, Tensor]  # level -> (B, H, W) uint16
    labels: Tensor | None  # (B,) int64


def code_data(
    codes: Codes,
    levels: list[str],
    config: TrainConfig,
    *,
    seed: int,
    dist: DistributedContext,
    context: StageContext,
) -> TrainingData:
    """Return this rank's batches of some levels: training rows, and the evaluation splits "seen" and "validation".

    "seen" are training images without augmentation; a gap to "validation" shows overfitting. Raises UserError if there
    are no codes of training images.
    """
    codes.require_split("train")
    shared = SharedCodes(codes, context)
    training_set = shared.split("train", levels)
    stream = ShuffledStream(len(training_set), seed)
    splits = {"seen": ("train", np.flatnonzero(training_set.copies == 0))}
    if "validation" in codes.splits:
        splits["validation"] = "validation", np.arange(codes.rows("validation"))

    def batch(split: CodeArrays, rows: np.ndarray) -> CodeBatch:
        grids = {level: torch.from_numpy(split.codes[level][rows]) for level in levels}
        return CodeBatch(grids, torch.from_numpy(split.labels[rows]) if codes.classes else None)

    def training(start: int) -> Iterator[CodeBatch]:
        arrays = shared.split("train", levels)
        sampler = GlobalBatchSampler(stream, config.batch_size, range(start, config.steps), dist.rank, dist.world_size)
        for refs in sampler:
            yield batch(arrays, np.array([ref.image_index for ref in refs]))

    def evaluation(split: str, rows: np.ndarray) -> Iterator[CodeBatch]:
        arrays, own_rows = shared.split(split, levels), rows[dist.rank : config.evaluate_images : dist.world_size]
        for start in range(0, len(own_rows), config.batch_size):
            yield batch(arrays, own_rows[start : start + config.batch_size])

    return TrainingData(training, {name: partial(evaluation, *split) for name, split in splits.items()})
