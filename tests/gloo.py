"""Several ranks on one machine: processes that communicate with gloo, without Ray."""

import multiprocessing
import socket
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed
from torch.multiprocessing import start_processes

# The fork server imports these once, for all processes that tests start.
multiprocessing.set_forkserver_preload(["pytest", "stages.prior", "stages.vqvae", "torch._dynamo"])


def run_ranks(work: Callable[..., None], *arguments: Any, world_size: int) -> None:
    """Call `work(rank, *arguments)` in one process per rank, with a process group. Raises if a process fails."""
    with socket.socket() as free_socket:
        free_socket.bind(("127.0.0.1", 0))
        port = free_socket.getsockname()[1]
    start_processes(_join, (work, arguments, world_size, port), nprocs=world_size, start_method="forkserver")


def _join(rank: int, work: Callable[..., None], arguments: tuple[Any, ...], world_size: int, port: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=world_size, rank=rank)
    work(rank, *arguments)
    distributed.destroy_process_group()
