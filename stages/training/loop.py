"""Training loop, independent of Ray: it gets batches, collectives and a reporter as arguments.

    for each step:  objective(batch)  ->  loss.backward(), gradients averaged by DDP  ->  optimizer
                    sums of the batch  ->  all-reduce during backward  ->  objective.absorb  ->  EMA

Besides DDP gradients, ranks exchange only sums. All randomness is a function of (seed, step, rank), so a checkpoint
holds no generator state.
"""

import math
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.random import seed_from
from stages.config import TrainConfig
from stages.errors import UserError
from stages.runtime.context import Reporter
from stages.training.checkpoint import Checkpoints
from stages.training.distributed import DistributedContext, StopVote, SumsInFlight, require_same_start
from stages.training.metric_accumulator import MetricAccumulator
from stages.training.objective import Objective, TrainingData
from stages.training.optimizer import learning_rate
from stages.training.state import METRICS_SINCE_LOG, TrainableModel, TrainState


class TrainingStopped(Exception):
    """Training stopped on request, after saving a checkpoint."""


def train(
    objective: Objective,
    data: TrainingData,
    config: TrainConfig,
    *,
    seed: int,
    dist: DistributedContext,
    checkpoints: Checkpoints,
    reporter: Reporter,
) -> None:
    """Train from the newest checkpoint to the last step. Rank 0 writes checkpoints and draws previews.

    Raises TrainingStopped after saving a checkpoint if a stop is requested, CheckpointMismatch if the ranks' newest
    checkpoints differ, and UserError if a metric is not finite, a checkpoint does not match the network, a parameter
    has no gradient, or the disk is too small.
    """
    objective.to(dist.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = TrainableModel(objective.network, config)
    resumed = checkpoints.latest()
    start, history = (resumed.step, resumed.history) if resumed is not None else (0, [])
    require_same_start(start, dist)
    metrics_since_log = MetricAccumulator(objective, dist)
    if resumed is not None:
        if mismatch := model.mismatch(resumed.tensors, len(metrics_since_log.local)):
            raise checkpoints.mismatch_error(resumed.step, mismatch)
        model.restore(resumed.tensors)
        metrics_since_log.restore(resumed.tensors[METRICS_SINCE_LOG])
        reporter.message(f"Resuming at step {start} of {config.steps}.")

    def save(step: int) -> None:
        tensors = model.tensors() | {METRICS_SINCE_LOG: metrics_since_log.gather_by_rank()}
        if dist.rank == 0:
            checkpoints.save(TrainState(step, tensors, history))

    def record(step: int, values: Mapping[str, float]) -> None:
        history.extend({"step": step, "name": name, "value": value} for name, value in values.items())
        reporter.metrics(values, step)

    wrapped = dist.wrap(objective)
    if config.compile:
        wrapped = torch.compile(wrapped)  # type: ignore[assignment]
    stop_vote, log_time, log_step = StopVote(dist), time.monotonic(), start
    for step, batch in enumerate(data.training(start), start):
        inject_nan = dist.inject_fault(step)
        objective.train()
        torch.manual_seed(seed_from(seed, step, 0 if objective.same_rng_on_all_workers else dist.rank))
        with autocast(config, dist.device):
            result = wrapped(batch, step, dist)
        sums_in_flight = SumsInFlight(result.sums, stop_vote.cast(), dist)
        (result.loss * math.nan if inject_nan else result.loss).backward()
        if step == start:
            model.require_gradients()
        model.apply_gradients(learning_rate(config, step), config.max_grad_norm)
        sums, votes = sums_in_flight.wait()
        objective.absorb(sums)
        model.update_ema()  # after `absorb`: the EMA copies the codebooks
        metrics_since_log.add(result.metrics)
        if step == start and dist.rank == 0:  # the optimizer has all its tensors now
            checkpoints.require_free_space(model.tensors(), _remaining_checkpoints(config, start))

        completed_steps, stopping = step + 1, stop_vote.count(votes)
        is_last = completed_steps == config.steps
        if completed_steps % config.log_every == 0 or is_last:
            values = metrics_since_log.summarize()
            _require_finite(values, completed_steps, checkpoints.folder)
            rate = config.batch_size * (completed_steps - log_step) / max(time.monotonic() - log_time, 1e-9)
            record(completed_steps, {f"train/{name}": value for name, value in values.items()})
            speed = {"train/images_per_second": rate, "train/learning_rate": learning_rate(config, step)}
            reporter.metrics(speed, completed_steps)
            reporter.progress(completed_steps, config.steps, "step", {**values, "images/s": rate})
            metrics_since_log, log_time, log_step = (
                MetricAccumulator(objective, dist),
                time.monotonic(),
                completed_steps,
            )
        if completed_steps % config.evaluate_every == 0 or is_last:
            evaluation_start = time.monotonic()
            for split, batches in data.evaluation.items():
                values = evaluate(objective, model.evaluation_network, batches(), dist)
                record(completed_steps, {f"{split}/{name}": value for name, value in values.items()})
            if dist.rank == 0:
                for name, png in objective.previews(model.evaluation_network).items():
                    reporter.image(name, png, completed_steps)
            log_time += time.monotonic() - evaluation_start  # images/s is the rate of training alone
        if completed_steps % config.checkpoint_every == 0 or is_last or stopping:
            save(completed_steps)
        if stopping and not is_last:
            checkpoints.wait()
            raise TrainingStopped(f"stopped at step {completed_steps}")
    checkpoints.wait()


def evaluate(
    objective: Objective, network: nn.Module, batches: Iterable[Any], dist: DistributedContext
) -> dict[str, float]:
    """Measure a network over the batches of all ranks, which may hold unequal numbers of them."""
    was_training = network.training
    network.eval()
    metrics = MetricAccumulator(objective, dist)
    with torch.inference_mode():
        for batch in batches:
            metrics.add(objective.measure(network, batch, dist))
    network.train(was_training)
    return metrics.summarize()


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[Any]:
    """Run matrix products and convolutions in the configured precision."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision == "bfloat16")


def _remaining_checkpoints(config: TrainConfig, start: int) -> int:
    every = config.checkpoint_every
    return config.steps // every - start // every + (config.steps % every > 0)


def _require_finite(values: Mapping[str, float], step: int, folder: Path) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise UserError(
                f"{name} must be finite, got {value} at step {step}; the checkpoints before it are kept.",
                where=folder,
                fix="Lower learning_rate, or set max_grad_norm, then run again.",
            )
