"""Two processes train the VQ-VAE as one does, through the stage's own objective and loop."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed

from models.config import LevelConfig, QuantizerConfig, VQVAEConfig
from models.vqvae import VQVAE
from stages.config import TrainConfig
from stages.errors import UserError
from stages.runtime.context import Reporter
from stages.training.checkpoint import Checkpoints
from stages.training.loop import Data, Worker, train
from stages.training.ray_train import _distributed
from stages.training.sampler import GlobalBatchSampler, ShuffledStream
from stages.vqvae import Reconstruct
from tests.gloo import together

IMAGES = torch.randint(0, 256, (11, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
HELD_OUT = IMAGES[:5]  # three for one worker, two for the other, and the last batch smaller
SHOWN = IMAGES[:2].numpy()
MODEL = VQVAEConfig(
    {name: LevelConfig(stride, 8, 4, 1, entries=16, dim=4) for name, stride in (("top", 8), ("bottom", 4))},
    QuantizerConfig(decay=0.9, revive_every=3, revive_below=0.5),
)
CONFIG = TrainConfig(steps=7, batch_size=4, learning_rate=1e-4, log_every=1, evaluate_every=2, checkpoint_every=7)


def train_worker(
    folder: Path, worker: Worker, model: VQVAEConfig = MODEL, config: TrainConfig = CONFIG
) -> dict[str, Tensor]:
    """Train to the end; return the weights and codebooks, and what was measured on the way as one more tensor."""

    def steps(start: int) -> Iterator[Tensor]:
        batches = GlobalBatchSampler(
            ShuffledStream(len(IMAGES), 0), 4, start=start, stop=7, rank=worker.rank, workers=worker.count
        )
        for picks in batches:
            yield IMAGES[[pick.image for pick in picks]]

    torch.manual_seed(3)
    objective = Reconstruct(VQVAE(model), SHOWN, CONFIG.batch_size, seed=3)
    data = Data(steps, {"validation": lambda: iter(HELD_OUT[worker.rank :: worker.count].split(2))})
    checkpoints = Checkpoints(folder / str(worker.rank), "print", keep=1)
    measured: list[float] = []

    class Listener(Reporter):
        def metrics(self, values, step):
            measured.extend(value for name, value in values.items() if "/" in name)

    train(objective, data, config, seed=3, worker=worker, checkpoints=checkpoints, reporter=Listener())
    state = {name: tensor.contiguous() for name, tensor in objective.network.state_dict().items()}
    return state | {"measured": torch.tensor(measured)}


def work(rank: int, folder: Path) -> None:
    """Be one of two; worker 0 alone draws previews."""
    worker = Worker(rank, 2, reduce=distributed.all_reduce, wrap=_distributed)
    save_file(train_worker(folder, worker), folder / f"{rank}.safetensors")


def inject_nan(rank: int, folder: Path) -> None:
    """Be one of two, of which the second computes a loss that is no number; keep what is said of it."""
    worker = Worker(
        rank, 2, reduce=distributed.all_reduce, wrap=_distributed, fault=lambda step: rank == 1 and step == 3
    )
    try:
        train_worker(folder, worker, config=replace(CONFIG, checkpoint_every=3))
    except UserError as error:
        (folder / f"{rank}.txt").write_text(f"{error.what}\n{error.where}")


def test_a_loss_that_is_no_number_on_one_worker_ends_both_at_one_step(tmp_path: Path):
    """Neither waits for the other, and the checkpoint before it stands."""
    together(inject_nan, tmp_path, count=2)
    told = [(tmp_path / f"{rank}.txt").read_text().splitlines() for rank in (0, 1)]
    what = r"\w+ became nan by step 5; the checkpoints before it are kept\."
    assert told[0][0] == told[1][0] and re.fullmatch(what, told[0][0])
    assert told[0][1] == str(tmp_path / "0")
    assert [path.name for path in (tmp_path / "0").iterdir()] == ["step-000000003"]


def test_two_workers_train_the_vqvae_as_one_does(tmp_path: Path):
    """Codebooks equal to the bit between them, and to 1e-6 those of one: previews, revivals, uneven last batches."""
    together(work, tmp_path, count=2)
    left, right = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    alone = train_worker(tmp_path / "alone", Worker())
    quiet = train_worker(
        tmp_path / "quiet", Worker(), replace(MODEL, quantizer=replace(MODEL.quantizer, revive_every=0))
    )

    codebooks = [name for name in alone if "quantizer" in name]
    assert len(codebooks) == 2 * 5
    assert not torch.equal(alone["levels.top.quantizer.codebook"], quiet["levels.top.quantizer.codebook"])  # revived
    assert all(torch.equal(left[name], right[name]) for name in left)
    for name in codebooks:
        torch.testing.assert_close(left[name], alone[name], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(left["measured"], alone["measured"], rtol=1e-4, atol=1e-6)
