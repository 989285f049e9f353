"""Several ranks on one machine: processes that communicate with gloo, without Ray."""

import socket
from collections.abc import Callable
from itertools import chain, repeat
from typing import Any

import torch
from torch import distributed
from torch.multiprocessing import start_processes

from stages.runtime.context import StageContext
from stages.training.distributed import DistributedContext, start_all_reduce, wrap_ddp
from stages.training.loop import TrainingStopped
from tests.fork_server import fork_server


def run_ranks(work: Callable[..., None], *arguments: Any, world_size: int) -> None:
    """Call `work(rank, *arguments)` in one process per rank, with a process group. Raises if a process fails."""
    with socket.socket() as free_socket:
        free_socket.bind(("127.0.0.1", 0))
        port = free_socket.getsockname()[1]
    fork_server()
    start_processes(_join, (work, arguments, world_size, port), nprocs=world_size, start_method="forkserver")


def train_with_ranks(
    train_worker: Callable[..., None],
    arguments: dict[str, Any],
    context: StageContext,
    *,
    world_size: int,
    stop_after: int = 0,
) -> None:
    """Train with several ranks, which share the work folder; request a stop after `stop_after` steps unless it is 0."""
    run_ranks(_train_rank, world_size, train_worker, arguments, context, stop_after, world_size=world_size)


def _train_rank(
    rank: int,
    world_size: int,
    train_worker: Callable[..., None],
    arguments: dict[str, Any],
    context: StageContext,
    stop_after: int,
) -> None:
    answers = chain(repeat(False, stop_after - 1), repeat(True)) if stop_after else repeat(False)
    dist = DistributedContext(
        rank,
        world_size,
        all_reduce=distributed.all_reduce,
        start_all_reduce=start_all_reduce,
        wrap=wrap_ddp,
        stop_requested=answers.__next__,
    )
    try:
        train_worker(dist=dist, context=context, **arguments)
    except TrainingStopped:
        assert stop_after


def _join(rank: int, work: Callable[..., None], arguments: tuple[Any, ...], world_size: int, port: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=world_size, rank=rank)
    work(rank, *arguments)
    distributed.destroy_process_group()
