"""Checks of the settings of trainings: those that are valid, and give a poor model."""

from collections.abc import Iterator

from pipeline.checks.check import Answer, Request
from stages.config import Params, TrainConfig

# The saved weights are an average of those of all steps. Above this weight of the first step, the model is much worse
# than its training metrics, and a codebook that is in use can look collapsed.
MAX_WEIGHT_OF_FIRST_STEP = 0.1


def check_moving_averages(request: Request) -> Answer:
    """Check that the moving averages of the weights forget the first step by the end of each training."""
    short = [
        f"{section}.ema_decay: {config.ema_decay:g}, for {config.steps:,} steps, leaves the weights of the first step "
        f"{weight:.0%} of the saved average"
        for stage, section, config in _trainings(request.settings)
        if stage in request.stages and (weight := weight_of_first_step(config)) > MAX_WEIGHT_OF_FIRST_STEP
    ]
    if short:
        return Answer("; ".join(short), "Increase steps, lower ema_decay, or set it to 0 to save the last weights.")
    return Answer("moving averages fit the number of steps")


def weight_of_first_step(config: TrainConfig) -> float:
    """Return the weight of the first step's weights in the saved moving average; 0 without one."""
    return config.ema_decay ** (config.steps - 1) if config.ema_decay else 0.0


def _trainings(settings: Params) -> Iterator[tuple[str, str, TrainConfig]]:
    """Yield the name of each training in DVC, its section of the settings, and the section."""
    yield "vqvae", "train_vqvae", settings.train_vqvae
    for level, prior in settings.priors.items():
        yield f"prior@{level}", f"priors.{level}.train", prior.train
    for name, classifier in settings.classifiers.items():
        yield f"classifier@{name}", f"classifiers.{name}.train", classifier.train
