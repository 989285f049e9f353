"""Origin of the evaluated results, from the artifacts alone: dataset, models, training steps and sampling settings.

Like the whole report, it depends on the settings and the seed only. Date, machine and commit are recorded by
stages/tracking/provenance.py.
"""

from collections.abc import Mapping
from typing import Any

from stages.evaluation.inputs import EvaluationInputs, EvaluationPlan
from stages.evaluation.report_data import Curve
from stages.formats import artifact


def describe_origin(inputs: EvaluationInputs, plan: EvaluationPlan, curves: Mapping[str, Curve]) -> dict[str, str]:
    """Return a text for each part of the pipeline. `curves` are the training curves by model, the VQ-VAE first."""
    steps = [f"{max((step for step, _, _ in curve), default=0):,} steps" for curve in curves.values()]
    levels = [
        f"{name} {grid.height} x {grid.width} codes of {grid.entries} entries"
        for name, grid in inputs.codes.levels.items()
    ]
    origin = {"Dataset": _dataset(inputs), "VQ-VAE": ", ".join([steps[0], *levels])}
    for level, prior_steps in zip(inputs.codes.levels, steps[1:], strict=True):
        prior_artifact = artifact.read(inputs.priors_folder / level, "prior", f"prior_{level}")
        origin[f"Prior of level {level}"] = f"{prior_artifact.meta['network']['name']}, {prior_steps}"
    features = ", ".join(plan.config.networks)
    return origin | {
        "Sampling": _sampling(inputs.samples.artifact.meta),
        "Evaluation": f"up to {plan.config.max_images:,} images of each split, features of {features}",
        "Seed": str(plan.seed),
    }


def _dataset(inputs: EvaluationInputs) -> str:
    shards = inputs.shards
    name = shards.artifact.meta["settings"].get("name", "")
    counts = [f"{len(shards.split(split)):,} {label}" for split, label in (("train", "training"), ("validation",) * 2)]
    classes = f", {len(shards.classes)} classes" if shards.classes else ""
    text = f"{' and '.join(counts)} images of {shards.image_size} x {shards.image_size} pixels{classes}"
    return f"{name}: {text}" if name else text


def _sampling(meta: Mapping[str, Any]) -> str:
    count, temperature = meta["count"], meta["temperature"]
    top_k = f"top-k {meta['top_k']}" if meta["top_k"] else "no top-k"
    top_p = f"top-p {meta['top_p']:g}" if meta["top_p"] < 1 else "no top-p"
    text = f"{count:,} {'sample' if count == 1 else 'samples'}, temperature {temperature:g}, {top_k}, {top_p}"
    # Settings that not all samples have are shown where they change the samples.
    if "guidance" in meta:
        text += f", guidance {meta['guidance']:g}"
    for level, rule in meta.get("level_rules", {}).items():
        text += f", {level}: " + " ".join(f"{name.replace('_', '-')} {value:g}" for name, value in rule.items())
    if meta.get("accepted", 1) < 1:
        text += f", {meta['accepted']:.1%} of the drawn accepted"
    return text
