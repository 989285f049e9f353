"""Checks of the settings of trainings: those that are valid, and give a poor model."""

from pipeline.checks.check import Answer, Request
from pipeline.conflicts import trainings
from pipeline.dvc_yaml import cli_name
from stages.config import TrainConfig

# The saved weights are an average of those of all steps. Above this weight of the first step, the model is much worse
# than its training metrics, and a codebook that is in use can look collapsed.
MAX_WEIGHT_OF_FIRST_STEP = 0.1


def check_moving_averages(request: Request) -> Answer:
    """Check that the moving averages of the weights forget the first step by the end of each training."""
    stages = {cli_name(stage) for stage in request.stages}
    short = [
        f"{section}.ema_decay: {config.ema_decay:g}, for {config.steps:,} steps, leaves the weights of the first step "
        f"{weight:.0%} of the saved average"
        for stage, (section, config) in trainings(request.settings).items()
        if stage in stages and (weight := weight_of_first_step(config)) > MAX_WEIGHT_OF_FIRST_STEP
    ]
    if short:
        return Answer("; ".join(short), "Increase steps, lower ema_decay, or set it to 0 to save the last weights.")
    return Answer("moving averages fit the number of steps")


def weight_of_first_step(config: TrainConfig) -> float:
    """Return the weight of the first step's weights in the saved moving average; 0 without one."""
    return config.ema_decay ** (config.steps - 1) if config.ema_decay else 0.0
