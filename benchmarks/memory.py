"""Memory of one GPU that trains the networks of the paper, counted on fake tensors (pipeline/training_memory.py).

    python benchmarks/memory.py --gpus 8
    python benchmarks/memory.py --table

Shows each network with the settings of its preset, with single images, and as before there were micro-batches and
recomputed activations: a worker's whole share in one pass. Nothing is allocated, and no GPU is needed.

`--table` prints the table of docs/cluster.md instead: for each number of GPUs, memory with the preset's micro-batches,
the largest micro-batch of each card, and hours at a share of the card's peak that is assumed, not measured.
"""

import argparse
from dataclasses import replace

from pipeline.commands import plan
from pipeline.compose import compose_settings
from pipeline.training_memory import GB, count_all
from stages.config import Params, TrainConfig

EXPERIMENTS = {"imagenet256": 1000, "ffhq1024": 0}  # -> classes
NUMBERS_OF_GPUS = (1, 4, 8, 64)
# Card -> memory in GB, and FLOP/s of dense matrix products in bfloat16, by NVIDIA's data sheets.
CARDS = {"RTX 4090": (24, 165e12), "A100 40 GB": (40, 312e12), "H100 SXM": (80, 989e12)}
SHARE_OF_PEAK = 0.4  # assumed


def main() -> None:
    """Print one row per network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=8, help="workers that share the batch")
    parser.add_argument("--table", action="store_true", help="print the table of docs/cluster.md")
    options = parser.parse_args()
    if options.table:
        print_table()
        return
    print(f"{'GB per GPU':<28}{'preset':>8}{'images':>8}{'one image':>11}{'before':>8}{'images':>8}")
    for experiment, classes in EXPERIMENTS.items():
        _, composed = compose_settings([f"experiment={experiment}"])
        settings = replace(composed, cluster=replace(composed.cluster, workers=options.gpus))
        for present, before in zip(
            count_all(settings, classes), count_all(without_savings(settings), classes), strict=True
        ):
            print(
                f"{f'{experiment} {present.stage}':<28}{present.total(present.microbatch) / GB:>8.1f}"
                f"{present.microbatch:>8}{present.total(1) / GB:>11.1f}{before.total(before.share) / GB:>8.1f}"
                f"{before.share:>8}",
                flush=True,
            )


def print_table() -> None:
    """Print one row per network and number of GPUs, in Markdown."""
    print("| training | GPUs | GB per GPU |" + "".join(f" {card}: micro-batch, hours |" for card in CARDS))
    print("|---|---|---|" + "---|" * len(CARDS))
    for experiment, classes in EXPERIMENTS.items():
        _, composed = compose_settings([f"experiment={experiment}"])
        flops = [training.training_flops for training in plan.count(composed, classes)]
        for gpus in NUMBERS_OF_GPUS:
            settings = replace(composed, cluster=replace(composed.cluster, workers=gpus))
            for memory, training_flops in zip(count_all(settings, classes), flops, strict=True):
                cells = [f"{experiment} {memory.stage}", str(gpus), f"{memory.total(memory.microbatch) / GB:.1f}"]
                for card_gb, peak in CARDS.values():
                    hours = training_flops / (gpus * peak * SHARE_OF_PEAK) / 3600
                    images = memory.largest_microbatch(card_gb * GB)
                    time = f"{float(f'{hours:.2g}'):,.0f} h" if hours >= 1 else "< 1 h"
                    cells.append(f"{images}, {time}" if images else "does not fit")
                print(f"| {' | '.join(cells)} |", flush=True)


def without_savings(settings: Params) -> Params:
    """Return settings without micro-batches and recomputed activations."""

    def plain(config: TrainConfig) -> TrainConfig:
        return replace(config, microbatch=None, recompute_activations=False)

    priors = {level: replace(prior, train=plain(prior.train)) for level, prior in settings.priors.items()}
    return replace(settings, train_vqvae=plain(settings.train_vqvae), priors=priors)


if __name__ == "__main__":
    main()
