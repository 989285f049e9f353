"""Timing of alternatives in turns, so that a busy machine slows all of them equally.

Prints medians of wall time and of processor time of this process. On a shared machine, quote processor time. With one
thread, both agree if nothing else runs.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch


class Seconds(NamedTuple):
    """Median seconds of one call."""

    wall: float
    processor: float


def arguments(description: str) -> argparse.ArgumentParser:
    """Create a parser with the options --threads and --rounds."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=1, choices=(1, 2), help="threads torch may use")
    parser.add_argument(
        "--rounds", type=int, default=7, help="timed calls of each alternative; the result is their median"
    )
    return parser


def measure(calls: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, Seconds]:
    """Time each call `rounds` times, in turns."""
    durations: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(warm_up + rounds):
        for name, call in calls.items():
            wall, processor = time.perf_counter(), time.process_time()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warm_up:
                durations[name].append((time.perf_counter() - wall, time.process_time() - processor))
    return {name: Seconds(*map(statistics.median, zip(*pairs, strict=True))) for name, pairs in durations.items()}


def table(title: str, seconds: Mapping[str, Seconds], ours: str) -> None:
    """Print the time of each alternative, and its ratio to the time of `ours`."""
    print(f"\n{title}  ({torch.get_num_threads()} threads, torch {torch.__version__})")
    print(f"  {'':44}{'wall ms':>11}{'processor ms':>15}{'x ours':>9}")
    for name, duration in seconds.items():
        ratio = duration.processor / seconds[ours].processor
        print(f"  {name:44}{duration.wall * 1e3:11.1f}{duration.processor * 1e3:15.1f}{ratio:9.2f}")


def matmul_peak(dtype: torch.dtype = torch.float32, side: int = 2048, rounds: int = 5) -> float:
    """Measure the speed of a large matrix product, in FLOP per second of processor time per thread."""
    left, right = torch.randn(side, side).to(dtype), torch.randn(side, side).to(dtype)
    seconds = measure({"product": lambda: left @ right}, rounds)["product"]
    return 2 * side**3 / seconds.processor
