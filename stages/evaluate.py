"""Evaluate the trained models and their samples, and write the report page.

reads   shards   image shards                          formats/shards.py
        vqvae    trained VQ-VAE                        formats/model_file.py
        codes    one row of codes per image            formats/codes.py
        priors   folder of trained priors, by level    formats/model_file.py
        samples  images sampled from the priors        formats/samples.py
writes  out      report.html; beside it, its images and all metrics
        metrics  the numbers to compare between runs, as JSON
        plots    rate-distortion, likelihood and codebook usage, as CSV; two contact sheets

The networks run over the first `max_images` of each split; the shards mix classes, so these are a fair selection.
Codebook usage and file sizes cover all images. Image sets are compared at one common number of images N, because most
metrics depend on N. Two baselines show the decoder's contribution alone: images decoded from uniformly random codes,
and from codes shuffled between images.
"""

import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stages.config import EvaluateConfig
from stages.errors import UserError
from stages.evaluation import ladder, summary
from stages.evaluation.inputs import COMPARED_SETS, EvaluationInputs, EvaluationPlan
from stages.evaluation.plots import write_plots
from stages.evaluation.report import write_report
from stages.evaluation.results import EvaluationResults
from stages.evaluation.worker import EvaluationWorker
from stages.formats import artifact, curves
from stages.formats.html_page import PROVENANCE_SCRIPT
from stages.mapping.parts import Part, map_parts
from stages.metrics.threads import one_thread
from stages.runtime.context import StageContext

IMAGES_PER_PART = 256  # what an interrupted run computes again at most, per worker
COMPRESSED_PER_PART = 16  # images: AVIF is slow, and small parts keep all workers busy
MIN_VALIDATION_IMAGES = 64  # with fewer, and more training images, the training images are the reference
MAX_QUERY_BYTES = 2**28  # images whose nearest training images are searched: each worker holds all of them in memory
RECONSTRUCTIONS_SHOWN = 8
PLOTTED_SHEETS = ("samples", "reconstructions")  # contact sheets that `dvc plots show` shows


def run(
    shards: Path,
    vqvae: Path,
    codes: Path,
    priors: Path,
    samples: Path,
    out: Path,
    metrics: Path,
    plots: Path,
    *,
    evaluate: EvaluateConfig,
    seed: int,
    context: StageContext,
) -> None:
    """Evaluate reconstructions, codebooks, priors and samples on the training and the validation images."""
    inputs = EvaluationInputs(*(folder.absolute() for folder in (shards, vqvae, codes, priors, samples)))
    inputs.check()
    plan = _plan(inputs, evaluate, seed)
    results_folder = (context.work_dir / "parts").absolute()
    results_folder.mkdir(parents=True, exist_ok=True)
    parts = list(_parts(inputs, plan))
    part_results = map_parts(
        EvaluationWorker, (asdict(inputs), plan, results_folder), parts, context=context, unit="image"
    )
    results = EvaluationResults(inputs, plan, parts, part_results)

    with one_thread():  # what this process computes is the same on any number of processors
        _write(results, out.absolute(), metrics, plots, context)


def _write(results: EvaluationResults, out: Path, metrics: Path, plots: Path, context: StageContext) -> None:
    """Compute the metrics; write the report, the headline metrics and the plots."""
    plan = results.plan
    values = curves.round_numbers(results.metrics())
    headline = summary.headline(values, results.feature_network)
    notes = summary.notes(values, plan.num_compared, plan.config)
    for note in notes:
        context.reporter.message(note)
    meta: dict[str, Any] = {"inputs": results.digests(), "settings": asdict(plan.config), "seed": plan.seed}
    with artifact.commit_folder(out, "report", meta) as folder:
        provenance = os.path.relpath(context.work_dir / PROVENANCE_SCRIPT, out)
        sheets = write_report(folder, results.report_data(values, notes, context.fingerprint, provenance))
        curves.write_metrics(folder / "metrics.json", values)
    for name, png in sheets.items():
        context.reporter.image(name, png, 0)
    curves.write_metrics(metrics, headline)
    write_plots(plots, values, results.entry_counts)
    for name in PLOTTED_SHEETS:
        (plots / f"{name}.png").write_bytes(sheets[name])


def _plan(inputs: EvaluationInputs, config: EvaluateConfig, seed: int) -> EvaluationPlan:
    sizes = {split: len(inputs.images(split)) for split in ("train", "validation")}
    too_few = sizes["validation"] < min(MIN_VALIDATION_IMAGES, sizes["train"])
    reference = "train" if too_few else "validation"
    num_compared = min(inputs.samples.count, sizes[reference], config.max_images)
    if not num_compared:
        raise UserError(
            "evaluate needs 1 or more samples and 1 or more reference images, "
            f"got {inputs.samples.count} samples and {sizes[reference]} {reference} images.",
            where=inputs.samples_folder,
            fix="Set sample.count to 1 or more. If the images are missing, see rejected.csv in the shards.",
            code=4,
        )
    num_ladder = min(config.ladder_images, num_compared, min(sizes[reference], config.max_images) // 2)
    has_ladder = num_ladder > 1  # no metric compares single images
    bytes_per_image = 3 * inputs.shards.image_size**2
    return EvaluationPlan(
        reference=reference,
        num_compared=num_compared,
        num_queries=max(1, min(num_compared, MAX_QUERY_BYTES // bytes_per_image)),
        num_examples=min(RECONSTRUCTIONS_SHOWN, sizes[reference]),
        num_ladder=num_ladder if has_ladder else 0,
        redrawn_levels=tuple(inputs.codes.levels)[1:] if has_ladder else (),
        config=config,
        seed=seed,
    )


def _parts(inputs: EvaluationInputs, plan: EvaluationPlan) -> Iterator[Part]:
    """Yield the parts, each a computation on a range of images. The slowest come first, so workers finish together."""
    sizes = {split: len(inputs.images(split)) for split in ("train", "validation")}
    limits = {split: min(plan.config.max_images, size) for split, size in sizes.items() if size}
    for level in plan.redrawn_levels:
        yield from _ranges("features", ladder.REDRAWN + level, plan.num_ladder, ladder.IMAGES_PER_PART)
    yield from _ranges("features", "train", limits["train"])
    if plan.reference == "validation":
        yield from _ranges("features", "validation", max(plan.num_compared, 2 * plan.num_ladder))
    for image_set in COMPARED_SETS:
        yield from _ranges("features", image_set, plan.num_compared)
    for split, size in limits.items():
        for level in reversed(list(inputs.codes.levels)):
            yield from _ranges("likelihood", split, size, level=level)
    for split, size in limits.items():
        yield from _ranges("distortion", split, size)
    compressed = min(plan.config.codec_images, limits[plan.reference])
    yield from _ranges("codecs", plan.reference, compressed, COMPRESSED_PER_PART)
    for image_set in plan.query_sets:
        yield from _ranges("nearest", image_set, sizes["train"])
    yield from _ranges("examples", plan.reference, plan.num_examples)
    for level, grid in inputs.codes.levels.items():
        yield from _ranges("codebook", level, grid.entries)


def _ranges(measure: str, image_set: str, size: int, per_part: int = IMAGES_PER_PART, **extra: str) -> Iterator[Part]:
    for start in range(0, size, per_part):
        stop = min(start + per_part, size)
        yield {
            "measure": measure,
            "image_set": image_set,
            **extra,
            "start": start,
            "stop": stop,
            "weight": stop - start,
        }
