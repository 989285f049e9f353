"""Checkpoints on nodes without a shared disk: the ranks of a node share a folder, and the first of them downloads."""

from datetime import timedelta

import torch
import torch.distributed

from stages.training.checkpoint import Checkpoints
from stages.training.distributed import DistributedContext

INPUTS_TIMEOUT_S = 12 * 3600  # until the slowest rank has fetched its inputs from the storage


def is_first_on_node(node: str, dist: DistributedContext) -> bool:
    """Return whether no lower rank has this node. `node` is an id of hexadecimal digits, of one length on all ranks."""
    if dist.world_size == 1:
        return True
    own_id = torch.tensor(list(bytes.fromhex(node)), dtype=torch.int32)
    ids = torch.zeros(dist.world_size, len(own_id), dtype=torch.int32)
    ids[dist.rank] = own_id
    torch.distributed.all_reduce(ids, group=torch.distributed.new_group(backend="gloo"))
    return not (ids[: dist.rank] == own_id).all(1).any()


def fetch_same_checkpoint(checkpoints: Checkpoints, dist: DistributedContext, *, is_first: bool) -> None:
    """Fetch on every node the checkpoint that rank 0 finds newest: a newer one may arrive in the storage meanwhile.

    The ranks of a node share a folder, and the first of them downloads to it.
    """
    step = torch.tensor([checkpoints.fetch() if dist.rank == 0 else 0])
    parallel = dist.world_size > 1
    if parallel:
        # Gloo works on every device, and the group's timeout allows for slow downloads of inputs.
        group = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=INPUTS_TIMEOUT_S))
        torch.distributed.broadcast(step, 0, group=group)
        if dist.rank > 0 and is_first and step:
            checkpoints.fetch_step(int(step))
    if is_first:
        checkpoints.remove_except(int(step))
    if parallel:
        torch.distributed.barrier(group=group)
