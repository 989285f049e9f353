"""Training loop, independent of Ray: it gets batches, collectives and a reporter as arguments.

    for each step:  objective(micro-batch)  ->  loss.backward(), gradients averaged over ranks  ->  optimizer
                    sums of micro-batches   ->  all-reduce during backward  ->  objective.absorb  ->  EMA

Besides gradients, ranks exchange only sums. All randomness is a function of (seed, step) and of the rank or of the
micro-batch's first image, so a checkpoint holds no generator state.
"""

import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.recompute import recompute_activations
from stages.config import TrainConfig
from stages.errors import UserError
from stages.runtime.context import Reporter
from stages.training.checkpoint import Checkpoints
from stages.training.checkpoint_state import METRICS_SINCE_LOG, TrainableModel, TrainState
from stages.training.device_peak import device_name, model_flops_metrics
from stages.training.distributed import DistributedContext, StepVote, require_same_start
from stages.training.gradient_accumulation import GradientAccumulator, autocast, split_batch
from stages.training.metric_accumulator import MetricAccumulator
from stages.training.objective import Objective, TrainingData
from stages.training.optimizer import learning_rate
from stages.training.step_timer import progress_numbers


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
    if config.recompute_activations:
        recompute_activations(objective.network)
    model = TrainableModel(objective.network, config)
    resumed = checkpoints.latest()
    start, history = (resumed.step, resumed.history) if resumed is not None else (0, [])
    saved_step = start
    require_same_start(start, dist)
    metrics_since_log = MetricAccumulator(objective, dist)
    if resumed is not None:
        if mismatch := model.mismatch(resumed.tensors, len(metrics_since_log.local)):
            raise checkpoints.mismatch_error(resumed.step, mismatch)
        model.restore(resumed.tensors)
        metrics_since_log.restore(resumed.tensors[METRICS_SINCE_LOG])
        reporter.message(f"Resuming at step {start} of {config.steps}.")

    def save(step: int) -> None:
        nonlocal saved_step
        saved_step = step
        dist.checkpoint_timer.restart()
        tensors = model.tensors() | gradients.tensors() | {METRICS_SINCE_LOG: metrics_since_log.gather_by_rank()}
        if dist.rank == 0:
            checkpoints.save(TrainState(step, tensors, history))

    def record(step: int, values: Mapping[str, float]) -> None:
        history.extend({"step": step, "name": name, "value": value} for name, value in values.items())
        reporter.metrics(values, step)

    gradients = GradientAccumulator(objective, config, seed=seed, dist=dist)
    if resumed is not None:
        gradients.restore(resumed.tensors)
    step_vote, log_time, log_step = StepVote(dist), time.monotonic(), start
    timer, device = gradients.timer, device_name(dist.device)
    with gradients.explain_out_of_memory():
        for step, batch in enumerate(timer.batches(data.training(start)), start):
            inject_nan = dist.inject_fault(step)
            objective.train()
            step_sums = gradients.accumulate(batch, step, step_vote.cast(), inject_nan=inject_nan)
            if step == start:
                model.require_gradients()
            model.apply_gradients(learning_rate(config, step), config.max_grad_norm)
            with timer.waiting_for_peers():
                sums, votes = step_sums.in_flight.wait()
            objective.absorb(sums)
            model.update_ema()  # after `absorb`: the EMA copies the codebooks
            for microbatch_metrics in step_sums.metrics:
                metrics_since_log.add(microbatch_metrics)
            if step == start and dist.rank == 0:  # the optimizer has all its tensors now
                checkpoints.require_free_space(model.tensors(), _remaining_checkpoints(config, start, dist))

            completed_steps, decision = step + 1, step_vote.count(votes)
            is_last = completed_steps == config.steps
            if completed_steps % config.log_every == 0 or is_last:
                values = metrics_since_log.summarize()
                _require_finite(values, completed_steps, checkpoints.folder)
                rate = config.batch_size * (completed_steps - log_step) / max(time.monotonic() - log_time, 1e-9)
                record(completed_steps, {f"train/{name}": value for name, value in values.items()})
                speed = {"images_per_second": rate, **timer.summarize(completed_steps - log_step)}
                speed |= model_flops_metrics(dist.flops_per_image, rate, dist.devices, device, config.precision)
                speed |= {"learning_rate": learning_rate(config, step)}
                reporter.metrics({f"train/{name}": value for name, value in speed.items()}, completed_steps)
                reporter.progress(completed_steps, config.steps, "step", {**values, **progress_numbers(speed)})
                timer.restart()
                metrics_since_log, log_time, log_step = (
                    MetricAccumulator(objective, dist),
                    time.monotonic(),
                    completed_steps,
                )
            if completed_steps % config.evaluate_every == 0 or is_last:
                evaluation_start = time.monotonic()
                for split, batches in data.evaluation.items():
                    parts = (part for batch in batches() for part in split_batch(batch, gradients.evaluation_size))
                    with autocast(config, dist.device):
                        values = evaluate(objective, model.evaluation_network, parts, dist)
                    record(completed_steps, {f"{split}/{name}": value for name, value in values.items()})
                if dist.rank == 0:
                    for name, png in objective.previews(model.evaluation_network).items():
                        reporter.image(name, png, completed_steps)
                # images/s and the time of a step are those of training alone
                log_time += time.monotonic() - evaluation_start
                timer.exclude(time.monotonic() - evaluation_start)
            # A vote to save is read one step later. A checkpoint of the step in between has done what it asks for.
            is_due = decision.save and saved_step < step
            if completed_steps % config.checkpoint_every == 0 or is_last or decision.stop or is_due:
                save(completed_steps)
            if decision.stop and not is_last:
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


def _remaining_checkpoints(config: TrainConfig, start: int, dist: DistributedContext) -> int:
    """Return the number of checkpoints to come; by time there may be one after each step."""
    if dist.checkpoint_timer.interval_s:
        return config.steps - start
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
