"""Memory of one GPU that trains the networks of the paper, counted on fake tensors (pipeline/training_memory.py).

    python benchmarks/memory.py --gpus 8

Shows each network with the settings of its preset, with single images, and as before there were micro-batches and
recomputed activations: a worker's whole share in one pass. Nothing is allocated, and no GPU is needed.
"""

import argparse
from dataclasses import replace

from pipeline.compose import compose_settings
from pipeline.training_memory import GB, count_all
from stages.config import Params, TrainConfig

EXPERIMENTS = {"imagenet256": 1000, "ffhq1024": 0}  # -> classes


def main() -> None:
    """Print one row per network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=8, help="workers that share the batch")
    options = parser.parse_args()
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


def without_savings(settings: Params) -> Params:
    """Return settings without micro-batches and recomputed activations."""

    def plain(config: TrainConfig) -> TrainConfig:
        return replace(config, microbatch=None, recompute_activations=False)

    priors = {level: replace(prior, train=plain(prior.train)) for level, prior in settings.priors.items()}
    return replace(settings, train_vqvae=plain(settings.train_vqvae), priors=priors)


if __name__ == "__main__":
    main()
