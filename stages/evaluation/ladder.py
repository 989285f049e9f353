"""Quality ladder: image sets from originals to samples, each with one more trained model between it and the originals.

    originals          images that no metric uses as the reference
    reconstructions    the same images, encoded and decoded by the VQ-VAE
    redrawn_LEVEL      the same images; LEVEL and all finer levels are drawn from their priors, given the coarser codes
    samples            all levels are drawn
    random_codes       decoded from random codes: no prior at all

All rungs are compared with other images of the same split, at one number of images. So the originals show the best
value that a model can reach, and each rung what one model loses: the VQ-VAE, or the prior of one level.

Axes: N images, D features.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from stages.config import SampleConfig
from stages.evaluation import summary
from stages.evaluation.inputs import EvaluationPlan
from stages.evaluation.summary import Metrics
from stages.metrics.networks import Network

REDRAWN = "redrawn_"  # followed by the coarsest drawn level: an image set
IMAGES_PER_PART = 64  # drawing is slow: small parts keep all workers busy
RUNG_IMAGES = 8  # shown of each rung
MIN_STANDARD_ERRORS = 2.0  # an increase of KID below this many is not significant
MAX_TOTAL_VARIATION = 0.25  # between the class distributions of two sets, 0 to 1


def rungs(levels: Iterable[str]) -> dict[str, str]:
    """Return the rungs, best first, each with the model that it adds: "vqvae", such as "prior_top", or ""."""
    coarsest, *finer = levels
    redrawn = {f"{REDRAWN}{level}": f"prior_{level}" for level in reversed(finer)}
    return {
        "originals": "",
        "reconstructions": "vqvae",
        **redrawn,
        "samples": f"prior_{coarsest}",
        "random_codes": "",
    }


def labels(levels: Iterable[str]) -> dict[str, str]:
    """Return what each rung shows, in words."""
    names = list(levels)
    texts = {
        "originals": "originals",
        "reconstructions": "reconstructions: all codes are real",
        "samples": "samples: all codes are drawn",
        "random_codes": "baseline: random codes",
    }
    for index, level in enumerate(names[1:], 1):
        texts[REDRAWN + level] = f"real {', '.join(names[:index])}; drawn {', '.join(names[index:])}"
    return {name: texts[name] for name in rungs(names)}


def sampling_config(meta: Mapping[str, Any], batch_size: int) -> SampleConfig:
    """Return the settings by which the samples were drawn, from their metadata, for drawing levels in the same way."""
    return SampleConfig.of_rule(meta, batch_size=batch_size)


def have_same_classes(sample_labels: np.ndarray, reference_labels: np.ndarray) -> bool:
    """Return whether the classes of two sets have nearly equal shares: their total variation distance is small."""
    labels = np.union1d(sample_labels, reference_labels)
    differences = [abs(np.mean(sample_labels == label) - np.mean(reference_labels == label)) for label in labels]
    return sum(differences) / 2 <= MAX_TOTAL_VARIATION


def metrics(
    features: Callable[[str], np.ndarray],
    plan: EvaluationPlan,
    levels: Sequence[str],
    network: Network,
    same_classes: bool = True,
) -> Metrics:
    """Compare the first N images of each rung with N images of the reference split that follow them.

    `features` returns the features, (N or more, D), of an image set. Adds under "steps" the increase of KID by model,
    without that of the coarsest prior if the samples have other classes than the reference. Empty without a ladder.
    """
    count = plan.num_ladder
    if not count:
        return {}
    reference = features(plan.reference)
    sets = {name: reference[:count] if name == "originals" else features(name)[:count] for name in rungs(levels)}
    pairs = {name: (reference[count : 2 * count], rung) for name, rung in sets.items()}
    compared = summary.comparisons(pairs, network, plan.config, plan.seed)
    steps = _steps(compared, rungs(levels), network.key("kid"))
    if not same_classes:
        steps.pop(f"prior_{levels[0]}", None)
    return {**compared, "steps": steps}


def _steps(compared: Metrics, models: Mapping[str, str], kid: str) -> Metrics:
    """Return how much each model increases KID, and the standard error: model -> values. Empty without KID."""
    steps: Metrics = {}
    names = list(models)
    for before, after in itertools.pairwise(names):
        if models[after] and kid in compared[after]:
            # The rungs share their reference, which makes the error of the difference smaller: this is a bound.
            errors = [compared[name].get(f"{kid}_se", math.nan) for name in (before, after)]
            steps[models[after]] = {"kid_increase": compared[after][kid] - compared[before][kid]}
            if not any(map(math.isnan, errors)):
                steps[models[after]]["kid_increase_se"] = math.hypot(*errors)
    return steps


def advice(steps: Metrics) -> str:
    """Say in one sentence which model loses most, and what to train longer. Empty without steps.

    Increases of KID up to twice their standard errors do not count.
    """
    if not steps:
        return ""
    significant = {
        name: values["kid_increase"]
        for name, values in steps.items()
        if values["kid_increase"] > MIN_STANDARD_ERRORS * values.get("kid_increase_se", 0.0)
    }
    if not significant:
        return "No model increases KID by more than twice its standard error: more images would tell them apart."
    model = max(significant, key=lambda name: float(significant[name]))
    total = sum(max(0.0, values["kid_increase"]) for values in steps.values())
    share = f"KID +{significant[model]:.4f} of +{total:.4f}"
    if model == "vqvae":
        return f"The VQ-VAE loses most ({share}): train it longer, or give it more codes or entries."
    return (
        f"The prior of level {model.removeprefix('prior_')} loses most ({share}): train it longer, or make it larger."
    )
