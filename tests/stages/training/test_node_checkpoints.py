"""Checkpoints without a shared disk: each node downloads one, the same, for all of its ranks."""

from pathlib import Path

import torch

from stages.runtime.storage import Storage
from stages.training.checkpoint import Checkpoints
from stages.training.checkpoint_state import TrainState
from stages.training.distributed import DistributedContext
from stages.training.node_checkpoints import fetch_same_checkpoint, is_first_on_node
from tests.gloo import run_ranks

RANKS_PER_NODE = 2


class CountedCheckpoints(Checkpoints):
    """Checkpoints that leave a file for each download."""

    def fetch_step(self, step: int) -> None:
        """Download, and count it."""
        super().fetch_step(step)
        downloads = self.folder.with_name(f"downloads-{self.folder.name}")
        downloads.mkdir(exist_ok=True)
        (downloads / str(len(list(downloads.iterdir())))).touch()


def open_on_node(folder: Path, node: int) -> Checkpoints:
    return CountedCheckpoints(folder / f"node-{node}", "f", keep=1, storage=Storage(f"file://{folder}/store"))


def fetch_as_rank(rank: int, folder: Path) -> None:
    node = rank // RANKS_PER_NODE
    checkpoints, dist = open_on_node(folder, node), DistributedContext(rank, 2 * RANKS_PER_NODE)
    is_first = is_first_on_node(f"{node:08x}", dist)
    assert is_first == (rank % RANKS_PER_NODE == 0)
    fetch_same_checkpoint(checkpoints, dist, is_first=is_first)
    state = checkpoints.latest()
    assert state is not None
    (folder / f"step-of-rank-{rank}").write_text(str(state.step))


def test_ranks_of_a_node_share_one_download(tmp_path: Path):
    """Every rank starts from the newest stored step, and older checkpoints of the nodes are gone."""
    writer = Checkpoints(tmp_path / "writer", "f", keep=1, storage=Storage(f"file://{tmp_path}/store"))
    for step in (3, 7):
        writer.save(TrainState(step, {"weight": torch.full((2,), float(step))}, []))
        writer.wait()
        if step == 3:
            open_on_node(tmp_path, 1).fetch()
    run_ranks(fetch_as_rank, tmp_path, world_size=2 * RANKS_PER_NODE)
    assert [(tmp_path / f"step-of-rank-{rank}").read_text() for rank in range(4)] == ["7"] * 4
    assert [len(list((tmp_path / f"downloads-node-{node}").iterdir())) for node in range(2)] == [1, 2]
    assert [path.name for path in (tmp_path / "node-1").iterdir()] == ["step-000000007"]
