"""Training steps per second of one and of two workers, beside the bare networks in one and in two processes.

    python benchmarks/workers.py --steps 200

Runs the stages vqvae, prior_top and prior_bottom of the demo with `cluster.workers` 1 and 2, one CPU core each, in
copies of this project. The bare network makes forward pass, loss, backward pass and the optimizer's step on random
data: no clipping, codebook update, moving average or metrics. It runs in one process on batches, and in two processes
side by side on halves of them, which exchange nothing; two synchronous workers could be no faster than the slower of
these. All rates are medians over intervals of steps, without the first two. Ray's own processes share the cores with
the workers, so on two cores two workers get less than two cores.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from quality import demo_settings
from torch import Tensor, nn

from models.priors import Grid, build, nll
from models.quantizer import BatchSlice
from models.vqvae import VQVAE
from stages.config import Params, TrainConfig
from stages.tracking.journal import JOURNAL_FILE
from stages.training.optimizer import build_optimizers
from tests.command_line_project import ROOT, CommandLineProject

STAGES = ("vqvae", "prior_top", "prior_bottom")
CLASSES = 9  # of the demo's images
SKIPPED = 2  # first intervals


def train_config(settings: Params, stage: str) -> TrainConfig:
    """Return the training settings of a stage."""
    return settings.train_vqvae if stage == "vqvae" else settings.priors[stage.removeprefix("prior_")].train


def bare_network(settings: Params, stage: str, batch: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Return a stage's network, and a function that computes its loss on random data."""
    side = settings.dataset.image_size
    if stage == "vqvae":
        images = torch.rand(batch, 3, side, side).contiguous(memory_format=torch.channels_last) * 2 - 1
        vqvae = VQVAE(settings.vqvae)
        return vqvae, lambda: vqvae.objective(vqvae(images, BatchSlice(0, 1, 0, batch)), images).total
    level = stage.removeprefix("prior_")
    names = list(settings.vqvae.levels)
    grids = {
        name: Grid(config.entries, side // config.stride, side // config.stride)
        for name, config in settings.vqvae.levels.items()
    }
    coarser = {name: grids[name] for name in names[: names.index(level)]}
    prior = build(
        settings.priors[level].network,
        entries=grids[level].entries,
        grid=(grids[level].height, grids[level].width),
        coarser=coarser,
        classes=CLASSES,
    )
    codes = {name: torch.randint(0, grid.entries, (batch, grid.height, grid.width)) for name, grid in grids.items()}
    conditions = {name: codes[name] for name in coarser}
    labels = torch.randint(0, CLASSES, (batch,))
    return prior, lambda: nll(prior(codes[level], conditions, labels), codes[level]).mean()


def train_bare(stage: str, batch: int, steps: int) -> None:
    """Train a bare network on one thread, after a line of input; print its steps per second."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    settings = demo_settings()
    config = train_config(settings, stage)
    network, loss = bare_network(settings, stage, batch)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizers = build_optimizers(network, config)
    print("ready", flush=True)
    sys.stdin.readline()
    interval, rates = config.log_every, []
    for _ in range(steps // interval):
        started = time.perf_counter()
        for _ in range(interval):
            loss().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        rates.append(interval / (time.perf_counter() - started))
    print(statistics.median(rates[SKIPPED:]))


def bare_rate(stage: str, batch: int, steps: int, count: int) -> float:
    """Return the steps per second of the slowest of `count` processes, which split the batch."""
    command = [sys.executable, __file__, "--bare", stage, str(batch // count), "--steps", str(steps)]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for _ in range(count)
    ]
    for process in processes:
        assert process.stdout
        if process.stdout.readline() != "ready\n":
            for started in processes:
                started.kill()
            raise SystemExit(f"{' '.join(command)} failed")
    for process in processes:  # all are ready: start them at once
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    return min(float(process.communicate()[0]) for process in processes)


def worker_rates(folder: Path, workers: int, steps: int, settings: Params) -> dict[str, float]:
    """Train every stage with `workers` workers; return its steps per second."""
    project = CommandLineProject.of_working_tree(folder)
    project.environment.update(PYTHONPATH=str(folder), DVC_SITE_CACHE_DIR=f"{folder}-dvc")
    keys = ("train_vqvae", *(f"priors.{level}.train" for level in settings.priors))
    overrides = [f"cluster.workers={workers}", *(f"{key}.steps={steps}" for key in keys)]
    arguments = [argument for override in overrides for argument in ("-S", override)]
    for stage in STAGES[1:]:
        project.call("vqvae2", "run", "--stage", stage, *arguments, timeout=3600)
    return {stage: logged_rate(folder, stage, train_config(settings, stage).batch_size) for stage in STAGES}


def logged_rate(folder: Path, stage: str, batch_size: int) -> float:
    """Return the median of a stage's logged steps per second."""
    rates: list[float] = []
    for path in sorted((folder / "runs" / stage).rglob(JOURNAL_FILE)):
        records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        rates += [
            record["values"]["train/images_per_second"] / batch_size
            for record in records
            if record["kind"] == "metrics" and "train/images_per_second" in record["values"]
        ]
    return statistics.median(rates[SKIPPED:])


def main() -> None:
    """Print steps per second and ratios for each stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="training steps of each stage")
    parser.add_argument("--bare", nargs=2, metavar=("STAGE", "BATCH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        train_bare(options.bare[0], int(options.bare[1]), options.steps)
        return
    settings = demo_settings()
    configs = {stage: train_config(settings, stage) for stage in STAGES}
    min_steps = max(max(config.warmup_steps, (SKIPPED + 1) * config.log_every) for config in configs.values())
    if options.steps < min_steps:
        parser.error(f"--steps must be {min_steps} or more, got {options.steps}")
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, {options.steps} steps", flush=True)
    bare: dict[str, list[float]] = {}
    for stage, config in configs.items():
        bare[stage] = [bare_rate(stage, config.batch_size, options.steps, count) for count in (1, 2)]
        print(f"{stage}: bare network measured", flush=True)
    worker_results = []
    with tempfile.TemporaryDirectory(prefix="vqvae2-workers-") as folder:
        for workers in (1, 2):
            worker_results.append(worker_rates(Path(folder, str(workers)), workers, options.steps, settings))
            print(f"{workers} of 2 workers measured", flush=True)
    columns = ("bare, 1", "bare, 2", "1 worker", "2 workers", "2 : 1", "1 : bare", "2 : bare")
    print(f"{'steps per second':16}" + "".join(f"{column:>11}" for column in columns))
    for stage in STAGES:
        bare_rates, rates = bare[stage], [results[stage] for results in worker_results]
        values = (*bare_rates, *rates, rates[1] / rates[0], rates[0] / bare_rates[0], rates[1] / bare_rates[1])
        print(f"{stage:16}" + "".join(f"{value:11.2f}" for value in values))


if __name__ == "__main__":
    main()
