"""The one training loop: it knows batches, sums and steps, and no cluster.

    for each step:  loss = objective(batch)  ->  gradients (averaged by DDP)  ->  optimizer
                    sums = what the objective wants added up over workers  ->  reduce  ->  absorb

Only sums cross workers, at moments that depend on the step alone, or on what they have agreed on; so no worker ever
waits for one that decided otherwise. All randomness is a function of (seed, step, rank): there is no random state to
save.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from stages.config import TrainConfig
from stages.errors import UserError
from stages.runtime.context import Reporter
from stages.training.checkpoint import Checkpoints, State

MetricSums = dict[str, Tensor]  # sums of one or more numbers under a name; they add up, over batches and over workers


class Stopped(Exception):
    """The run was asked to stop; its state is saved."""


class CheckpointMismatch(Exception):
    """The workers would begin at different steps."""


@dataclass(frozen=True)
class Worker:
    """This process among those that train together."""

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    reduce: Callable[[Tensor], None] = lambda tensor: None  # adds up over workers, in place
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module  # averages gradients over workers
    stopping: Callable[[], bool] = lambda: False
    fault: Callable[[int], bool] = lambda step: False  # lets come what was asked for; says if the step is to be spoilt


class Step(NamedTuple):
    """What one batch says."""

    loss: Tensor
    sums: list[Tensor]  # added up over workers, then handed to `absorb`
    totals: MetricSums  # what to report


class Objective(nn.Module):
    """A network, what a batch costs it, and how well it does on images it does not learn from."""

    network: nn.Module
    same_rng_on_all_workers = (
        False  # whether `forward` draws for the whole global batch, so that workers must all draw the same
    )

    def zeros(self) -> MetricSums:
        """Begin to add up what `forward` and `measure` return."""
        raise NotImplementedError

    def forward(self, batch: Any, step: int, worker: Worker) -> Step:
        raise NotImplementedError

    def absorb(self, sums: list[Tensor]) -> None:
        """Learn what is not learnt by gradients."""

    def measure(self, network: nn.Module, batch: Any, worker: Worker) -> MetricSums:
        """Add up what is measured on a batch, under any weights."""
        raise NotImplementedError

    def summarize(self, totals: MetricSums) -> dict[str, float]:
        """Divide sums over all batches and workers, once."""
        raise NotImplementedError

    def pictures(self, network: nn.Module) -> dict[str, bytes]:
        """Draw what shows how far the network is, as PNG."""
        return {}


@dataclass(frozen=True)
class Data:
    """What the loop reads; both are called anew and yield this worker's batches."""

    training: Callable[[int], Iterable[Any]]  # first step -> one batch per step, from that step on
    evaluation: Mapping[str, Callable[[], Iterable[Any]]]  # split -> its batches


def train(
    objective: Objective,
    data: Data,
    config: TrainConfig,
    *,
    seed: int,
    worker: Worker,
    checkpoints: Checkpoints,
    reporter: Reporter,
) -> None:
    """Train to the last step, going on from the newest checkpoint. Rank 0 saves and reports.

    Raises Stopped after saving when the run is asked to stop, CheckpointMismatch when workers find different ones, and
    UserError when the loss is no longer finite.
    """
    objective.to(worker.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(objective.network.parameters(), lr=config.learning_rate)
    ema_model = _averaged(objective.network, config.ema_decay)
    resumed = checkpoints.latest()
    start, history = (resumed.step, resumed.history) if resumed is not None else (0, [])
    _require_one_start(start, worker)
    since = _Sums(objective, worker)  # the last step that is logged
    if resumed is not None:
        weights = _weights(objective.network, ema_model)
        _require_whole(checkpoints, resumed, objective, weights | {"since": since.own[None]})
        _restore(resumed.tensors, objective.network, optimizer, ema_model)
        since.restore(resumed.tensors["since"])
        reporter.note(f"Resuming at step {start} of {config.steps}.")

    def save(step: int) -> None:
        tensors = _tensors(objective.network, optimizer, ema_model) | {"since": since.gather_by_rank()}
        if worker.rank == 0:
            checkpoints.save(State(step, tensors, history))

    def record(step: int, values: Mapping[str, float]) -> None:
        history.extend({"step": step, "name": name, "value": value} for name, value in values.items())
        reporter.metrics(values, step)

    wrapped = worker.wrap(objective)
    if config.compile:
        wrapped = torch.compile(wrapped)  # type: ignore[assignment]
    stop, clock, logged = _Stop(worker), time.monotonic(), start
    for step, batch in enumerate(data.training(start), start):
        inject_nan = worker.fault(step)
        objective.train()
        torch.manual_seed(_mix(seed, step, 0 if objective.same_rng_on_all_workers else worker.rank))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        with autocast(config, worker.device):
            result = wrapped(batch, step, worker)
        (result.loss * math.nan if inject_nan else result.loss).backward()
        if config.max_grad_norm:
            nn.utils.clip_grad_norm_(objective.network.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for tensor in result.sums:
            worker.reduce(tensor)
        objective.absorb(result.sums)
        if ema_model is not None:
            ema_model.update_parameters(objective.network)
        since.add(result.totals)
        if step == start:  # the optimizer has all its tensors now
            _require_gradients(objective.network, optimizer)
            every = config.checkpoint_every
            remaining_checkpoints = config.steps // every - start // every + (config.steps % every > 0)
            if worker.rank == 0:
                checkpoints.require_room(_tensors(objective.network, optimizer, ema_model), remaining_checkpoints)

        done, stopping = step + 1, stop.agreed()
        if done % config.log_every == 0 or done == config.steps:
            values = since.summary()
            _check_finite(values, done, checkpoints.folder)
            rate = config.batch_size * (done - logged) / max(time.monotonic() - clock, 1e-9)
            record(done, {f"train/{name}": value for name, value in values.items()})
            reporter.metrics({"images_per_second": rate, "learning_rate": learning_rate(config, step)}, done)
            reporter.progress(done, config.steps, "step", {**values, "images/s": rate})
            since, clock, logged = _Sums(objective, worker), time.monotonic(), done
        if done % config.evaluate_every == 0 or done == config.steps:
            began = time.monotonic()
            network = objective.network if ema_model is None else ema_model.module
            for split, batches in data.evaluation.items():
                record(done, {f"{split}/{k}": v for k, v in evaluate(objective, network, batches(), worker).items()})
            if worker.rank == 0:
                for name, png in objective.pictures(network).items():
                    reporter.picture(name, png, done)
            clock += time.monotonic() - began  # the rate is that of training alone
        if done % config.checkpoint_every == 0 or done == config.steps or stopping:
            save(done)
        if stopping and done < config.steps:
            checkpoints.wait()
            raise Stopped(f"stopped at step {done}")
    checkpoints.wait()


def _require_one_start(start: int, worker: Worker) -> None:
    """Begin together or not at all: workers that are a checkpoint apart would train on, and nobody would notice.

    A network disk may show one node what another has not heard of yet, and one node's bad moment may cost it a file.
    """
    starts = torch.zeros(worker.count, dtype=torch.int64, device=worker.device)
    starts[worker.rank] = start
    worker.reduce(starts)
    if (starts != start).any():
        raise CheckpointMismatch(
            f"The workers' newest checkpoints are of steps {', '.join(map(str, starts.tolist()))}."
        )


def evaluate(objective: Objective, network: nn.Module, batches: Iterable[Any], worker: Worker) -> dict[str, float]:
    """Measure a network over all workers' batches; workers may hold unequal numbers of them."""
    was_training = network.training
    network.eval()
    sums = _Sums(objective, worker)
    with torch.inference_mode():
        for batch in batches:
            sums.add(objective.measure(network, batch, worker))
    network.train(was_training)
    return sums.summary()


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate at a step: a linear rise, then constant or half a cosine down to zero."""
    rate = config.learning_rate
    if step < config.warmup_steps:
        return rate * (step + 1) / config.warmup_steps
    if config.lr_schedule == "cosine":
        share = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
        rate *= 0.5 * (1 + math.cos(math.pi * share))
    return rate


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[Any]:
    """Run matrix products in the configured precision."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision == "bfloat16")


class _Sums:
    """Totals over batches, then over workers, then divided once. A worker without batches adds zeros."""

    def __init__(self, objective: Objective, worker: Worker) -> None:
        self.objective, self.worker = objective, worker
        self.lengths = {name: len(total) for name, total in objective.zeros().items()}
        self.own = torch.zeros(sum(self.lengths.values()), dtype=torch.double, device=worker.device)

    def add(self, totals: MetricSums) -> None:
        self.own += torch.cat([totals[name].detach().to(self.own) for name in self.lengths])

    def summary(self) -> dict[str, float]:
        together = self.own.clone()
        self.worker.reduce(together)
        parts = together.cpu().split(list(self.lengths.values()))
        return self.objective.summarize(dict(zip(self.lengths, parts, strict=True)))

    def gather_by_rank(self) -> Tensor:
        """Tell every worker's totals to all, one row each: added up, they could not be continued to the bit."""
        rows = self.own.new_zeros(self.worker.count, len(self.own))
        rows[self.worker.rank] = self.own
        self.worker.reduce(rows)
        return rows

    def restore(self, rows: Tensor) -> None:
        """Go on from what `by_worker` told: this worker from its own row, and from those of workers that are gone."""
        self.own += rows[self.worker.rank :: self.worker.count].sum(0).to(self.own.device)


class _Stop:
    """Whether any worker was asked to stop: all agree on the same step, and no GPU runs dry for it.

    Several workers hear the answer to what they asked one step earlier, while the GPU is busy with this one.
    """

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._answer = torch.zeros(1)
        self._arrived: torch.cuda.Event | None = None

    def agreed(self) -> bool:
        """Answer; every worker asks after every step."""
        if self.worker.count == 1:
            return self.worker.stopping()
        if self._arrived is not None:
            self._arrived.synchronize()
        agreed = bool(self._answer)
        flag = torch.full((1,), float(self.worker.stopping()), device=self.worker.device)
        self.worker.reduce(flag)
        self._answer = flag.to("cpu", non_blocking=True)
        if flag.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        return agreed


def _check_finite(values: Mapping[str, float], step: int, folder: Path) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise UserError(
                f"{name} became {value} by step {step}; the checkpoints before it are kept.",
                where=folder,
                fix="Lower learning_rate, or set max_grad_norm, then run again.",
            )


def _averaged(network: nn.Module, decay: float) -> AveragedModel | None:
    if not decay:
        return None
    ema_model = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay))
    ema_model.module.requires_grad_(False)
    return ema_model


def _tensors(
    network: nn.Module, optimizer: torch.optim.Optimizer, ema_model: AveragedModel | None
) -> dict[str, Tensor]:
    tensors = _weights(network, ema_model)
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
    return tensors


def _weights(network: nn.Module, ema_model: AveragedModel | None) -> dict[str, Tensor]:
    tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    if ema_model is not None:
        tensors |= {f"averaged.{name}": tensor for name, tensor in ema_model.state_dict().items()}
    return tensors


def _require_whole(checkpoints: Checkpoints, state: State, objective: Objective, wanted: dict[str, Tensor]) -> None:
    """Refuse a checkpoint that lacks something, intact as it may be: Adam would begin anew and not say so."""
    found = {name: tensor.shape for name, tensor in state.tensors.items()}
    needed = {name: tensor.shape for name, tensor in wanted.items()}
    for index, weight in enumerate(objective.network.parameters()):
        if weight.requires_grad:
            moments = {"step": torch.Size(), "exp_avg": weight.shape, "exp_avg_sq": weight.shape}
            needed |= {f"optimizer.{index}.{name}": shape for name, shape in moments.items()}
    # A row for each of however many workers there were.
    needed["since"] = torch.Size([*found.get("since", [])[:1], *needed["since"][1:]])
    if wrong := sorted(name for name in needed.keys() | found.keys() if needed.get(name) != found.get(name)):
        others = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise checkpoints.unfit(state.step, f"{wrong[0]}{others} is missing, too much, or of another shape")


def _require_gradients(network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse a network of which a part is never used: DDP would do so one step later, in words of its own."""
    for name, weight in network.named_parameters():
        if weight.requires_grad and weight not in optimizer.state:
            raise UserError(
                f"The network's {name} has no part in the loss.",
                where=type(network).__name__,
                fix="Use it in forward, leave it out, or set its requires_grad to False.",
            )


def _restore(
    tensors: Mapping[str, Tensor],
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema_model: AveragedModel | None,
) -> None:
    network.load_state_dict(dict(under("network.", tensors)))
    if ema_model is not None:
        ema_model.load_state_dict(dict(under("averaged.", tensors)))
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in under("optimizer.", tensors):
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def under(prefix: str, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Name the tensors of one part of a state without its prefix."""
    return ((name.removeprefix(prefix), tensor) for name, tensor in tensors.items() if name.startswith(prefix))


def _mix(*numbers: int) -> int:
    """One 63-bit seed of several numbers (FNV-1a over their bytes)."""
    value = 0xCBF29CE484222325
    for number in numbers:
        for byte in number.to_bytes(8, "little"):
            value = (value ^ byte) * 0x100000001B3 % 2**64
    return value >> 1
