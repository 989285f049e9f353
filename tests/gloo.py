"""Several workers on one machine: processes that meet by gloo, without Ray."""

import multiprocessing
import socket
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed
from torch.multiprocessing import start_processes

# Imported once, for all processes that tests start.
multiprocessing.set_forkserver_preload(["pytest", "stages.prior", "stages.vqvae", "torch._dynamo"])


def together(work: Callable[..., None], *arguments: Any, count: int) -> None:
    """Call `work(rank, *arguments)` in `count` processes that can reduce over one another; fail if one of them does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_processes(_join, (work, arguments, count, port), nprocs=count, start_method="forkserver")


def _join(rank: int, work: Callable[..., None], arguments: tuple[Any, ...], count: int, port: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=count, rank=rank)
    work(rank, *arguments)
    distributed.destroy_process_group()
