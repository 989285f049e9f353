"""Training loop, independent of Ray: it gets batches, collectives and a reporter as arguments.

    each step:  micro-batch -> objective -> loss           -> backward pass, gradients averaged over ranks -> optimizer
                                         -> codebook sums  -> all-reduce during the backward pass -> absorb -> EMA

Besides gradients, ranks exchange only sums. Random numbers are seeded by (seed, step) and, where ranks must differ, by
the rank or by the index of the micro-batch's first image. So a checkpoint needs no generator state.
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
from stages.training.distributed import DistributedContext, StepDecision, StepVote, require_same_start
from stages.training.gradient_accumulation import GradientAccumulator, autocast, split_batch
from stages.training.metric_accumulator import MetricAccumulator
from stages.training.objective import Objective, TrainingData
from stages.training.optimizer import learning_rate
from stages.training.step_timer import progress_numbers, step_seconds


class TrainingStopped(Exception):
    """Training stopped on request, after saving a checkpoint."""


class TrainingLoop:
    """Training from the newest checkpoint to the last step. Rank 0 writes checkpoints and draws previews."""

    def __init__(
        self,
        objective: Objective,
        data: TrainingData,
        config: TrainConfig,
        *,
        seed: int,
        dist: DistributedContext,
        checkpoints: Checkpoints,
        reporter: Reporter,
    ) -> None:
        self.objective, self.data, self.config = objective, data, config
        self.dist, self.checkpoints, self.reporter = dist, checkpoints, reporter
        objective.to(dist.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if config.recompute_activations:
            recompute_activations(objective.network)
        self.model = TrainableModel(objective.network, config)
        self.gradients = GradientAccumulator(objective, config, seed=seed, dist=dist)
        self.timer = self.gradients.timer
        self.metrics_since_log = MetricAccumulator(objective, dist)
        self.history: list[dict[str, Any]] = []
        self.step_vote = StepVote(dist)
        self.last_saved = self.last_logged = 0  # completed steps

    def run(self) -> None:
        """Train to the last step.

        Raises TrainingStopped after saving a checkpoint if a stop is requested, CheckpointMismatch if the ranks' newest
        checkpoints are of different steps, and UserError if a metric is not finite, a checkpoint does not match the
        network, a parameter has no gradient, or the disk is too small.
        """
        start = self.resume()
        with self.gradients.explain_out_of_memory():
            for step, batch in enumerate(self.timer.batches(self.data.training(start)), start):
                decision = self.run_step(step, batch, is_first=step == start)
                completed_steps = step + 1
                is_last = completed_steps == self.config.steps
                if completed_steps % self.config.log_every == 0 or is_last:
                    self.log(completed_steps)
                if completed_steps % self.config.evaluate_every == 0 or is_last:
                    self.evaluate_splits(completed_steps)
                # With several ranks, the decision belongs to the votes of the step before. A checkpoint that was saved
                # after that step has satisfied them.
                is_save_requested = decision.save and self.last_saved < completed_steps - 1
                if completed_steps % self.config.checkpoint_every == 0 or is_last or decision.stop or is_save_requested:
                    self.save(completed_steps)
                if decision.stop and not is_last:
                    self.checkpoints.wait()
                    raise TrainingStopped(f"stopped at step {completed_steps}")
        self.checkpoints.wait()

    def resume(self) -> int:
        """Restore the newest checkpoint; return its step, 0 if there is none."""
        state = self.checkpoints.latest()
        start = state.step if state is not None else 0
        require_same_start(start, self.dist)
        if state is not None:
            if mismatch := self.model.mismatch(state.tensors, len(self.metrics_since_log.local)):
                raise self.checkpoints.mismatch_error(state.step, mismatch)
            self.model.restore(state.tensors)
            self.gradients.restore(state.tensors)
            self.metrics_since_log.restore(state.tensors[METRICS_SINCE_LOG])
            self.history = state.history
            self.reporter.message(f"Resuming at step {start} of {self.config.steps}.")
        self.last_saved = self.last_logged = start
        self.timer.restart()
        return start

    def run_step(self, step: int, batch: Any, *, is_first: bool) -> StepDecision:
        """Train on one batch; return what all ranks have agreed to do after it. `step` counts the steps before it."""
        inject_nan = self.dist.inject_fault(step)
        self.objective.train()
        step_sums = self.gradients.accumulate(batch, step, self.step_vote.cast(), inject_nan=inject_nan)
        if is_first:
            self.model.require_gradients()
        self.model.apply_gradients(learning_rate(self.config, step), self.config.max_grad_norm)
        with self.timer.waiting_for_peers():
            sums, votes = step_sums.in_flight.wait()
        self.objective.absorb(sums)
        self.model.update_ema()  # after `absorb`: the EMA copies the codebooks
        for microbatch_metrics in step_sums.metrics:
            self.metrics_since_log.add(microbatch_metrics)
        if is_first and self.dist.rank == 0:  # the optimizer has all its tensors now
            remaining = _remaining_checkpoints(self.config, step, self.dist)
            self.checkpoints.require_free_space(self.model.tensors(), remaining)
        return self.step_vote.count(votes)

    def log(self, completed_steps: int) -> None:
        """Report the metrics and the speed of the steps since the last log entry."""
        values = self.metrics_since_log.summarize()
        seconds = self.timer.summarize(completed_steps - self.last_logged)  # before anything is reported
        _require_finite(values, completed_steps, self.checkpoints.folder)
        self._record("train", values, completed_steps)
        images_per_second = self.config.batch_size / max(step_seconds(seconds), 1e-9)
        speed = {
            "images_per_second": images_per_second,
            **seconds,
            **model_flops_metrics(
                self.dist.flops_per_image,
                images_per_second,
                self.dist.devices,
                device_name(self.dist.device),
                self.config.precision,
            ),
            "learning_rate": learning_rate(self.config, completed_steps - 1),
        }
        self.reporter.metrics({f"train/{name}": value for name, value in speed.items()}, completed_steps)
        self.reporter.progress(completed_steps, self.config.steps, "step", {**values, **progress_numbers(speed)})
        self.metrics_since_log = MetricAccumulator(self.objective, self.dist)
        self.last_logged = completed_steps
        self.timer.restart()

    def evaluate_splits(self, completed_steps: int) -> None:
        """Measure every split, and draw previews. The training speed excludes this time."""
        start_s = time.monotonic()
        network = self.model.evaluation_network
        for split, batches in self.data.evaluation.items():
            size = self.gradients.evaluation_size
            microbatches = (microbatch for batch in batches() for microbatch in split_batch(batch, size))
            with autocast(self.config, self.dist.device):
                values = evaluate(self.objective, network, microbatches, self.dist)
            self._record(split, values, completed_steps)
        if self.dist.rank == 0:
            for name, png in self.objective.previews(network).items():
                self.reporter.image(name, png, completed_steps)
        self.timer.exclude(time.monotonic() - start_s)

    def save(self, completed_steps: int) -> None:
        """Save a checkpoint of all ranks' state."""
        self.last_saved = completed_steps
        self.dist.checkpoint_timer.restart()
        metrics = {METRICS_SINCE_LOG: self.metrics_since_log.gather_by_rank()}
        tensors = self.model.tensors() | self.gradients.tensors() | metrics
        if self.dist.rank == 0:
            self.checkpoints.save(TrainState(completed_steps, tensors, self.history))

    def _record(self, split: str, values: Mapping[str, float], completed_steps: int) -> None:
        """Report metrics, and append them to the history, which becomes the curves of the artifact."""
        named = {f"{split}/{name}": value for name, value in values.items()}
        self.history.extend({"step": completed_steps, "name": name, "value": value} for name, value in named.items())
        self.reporter.metrics(named, completed_steps)


def evaluate(
    objective: Objective, network: nn.Module, batches: Iterable[Any], dist: DistributedContext
) -> dict[str, float]:
    """Measure a network over all ranks' batches. Ranks may have different numbers of batches."""
    was_training = network.training
    network.eval()
    metrics = MetricAccumulator(objective, dist)
    with torch.inference_mode():
        for batch in batches:
            metrics.add(objective.measure(network, batch, dist))
    network.train(was_training)
    return metrics.summarize()


def _remaining_checkpoints(config: TrainConfig, start: int, dist: DistributedContext) -> int:
    """Return the largest number of checkpoints still to be saved. With a time interval, that is one per step."""
    if dist.checkpoint_timer.interval_s:
        return config.steps - start
    every = config.checkpoint_every
    return config.steps // every - start // every + (config.steps % every > 0)


def _require_finite(values: Mapping[str, float], step: int, folder: Path) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise UserError(
                f"{name} must be finite, got {value} at step {step}; earlier checkpoints are kept.",
                where=folder,
                fix="Lower learning_rate, or set max_grad_norm, then run again.",
            )
