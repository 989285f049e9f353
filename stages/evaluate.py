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
Codebook usage and file sizes cover all images, and so does the search for the nearest training images. Image sets are
compared at one common number of images N, because most metrics depend on N. Two baselines show the decoder's
contribution alone: images decoded from uniformly random codes, and from codes shuffled between images.
"""

import os
from collections.abc import Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from stages.config import EvaluateConfig
from stages.errors import UserError
from stages.evaluation import ladder, summary
from stages.evaluation.inputs import (
    COMPARED_SETS,
    EvaluationInputs,
    EvaluationPlan,
    choose_references,
    has_few_validation_images,
)
from stages.evaluation.part_files import feature_name, part_path, write_features
from stages.evaluation.plots import write_plots
from stages.evaluation.report import write_report
from stages.evaluation.results import EvaluationResults
from stages.evaluation.set_comparison import SetPair, compare_sets
from stages.evaluation.worker import EvaluationWorker
from stages.formats import artifact, curves
from stages.formats.html_page import PROVENANCE_SCRIPT
from stages.mapping.parts import Part, Result, map_parts
from stages.metrics.features import check_networks
from stages.metrics.networks import read_networks
from stages.metrics.threads import one_thread
from stages.runtime.context import StageContext

IMAGES_PER_PART = 256  # after an interruption, each worker computes at most this many images again
COMPRESSED_PER_PART = 16  # images: AVIF is slow, and small parts keep all workers busy
# Training images of one part of a nearest-neighbour search: larger than other parts, because the result of a part has
# k neighbours per query, however few images it searches.
SEARCH_IMAGES_PER_PART = 1024
MAX_SEARCH_BYTES = 2**28  # of the query images, and of the training images of one part: a worker holds both in memory
RECONSTRUCTIONS_SHOWN = 8
QUERY_LABELS = {"samples": "samples", "validation": "validation images"}
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
    check_networks(plan.networks, inputs.shards.image_size)  # before the hours that the other parts may take
    results_folder, features_folder = (context.work_dir.absolute() / name for name in ("parts", "features"))
    results_folder.mkdir(parents=True, exist_ok=True)

    def map_all(parts: list[Part], *arguments: Path) -> list[Result]:
        arguments = (results_folder, *arguments)
        return map_parts(EvaluationWorker, (asdict(inputs), plan, *arguments), parts, context=context, unit="image")

    parts = list(_parts(inputs, plan))
    results = map_all(parts)
    _write_features(features_folder, results_folder, parts)
    search_parts = list(_search_parts(inputs, plan))
    results += map_all(search_parts, features_folder)
    names = [network.name for network in plan.networks]
    compared = compare_sets(
        features_folder, results_folder, names, _pairs(plan), plan.num_compared, evaluate, seed, context
    )

    with one_thread():  # so that results do not depend on the number of processors
        _write(
            EvaluationResults(inputs, plan, [*parts, *search_parts], results, features_folder, compared),
            out.absolute(),
            metrics,
            plots,
            context,
        )


def _write(results: EvaluationResults, out: Path, metrics: Path, plots: Path, context: StageContext) -> None:
    """Compute the metrics; write the report, the headline metrics and the plots."""
    plan = results.plan
    values = curves.round_numbers(results.metrics())
    headline = summary.headline(values, plan.networks)
    notes = summary.notes(values, plan.num_compared, plan.networks, plan.config)
    queries = " and ".join(f"{count:,} {QUERY_LABELS[image_set]}" for image_set, count in plan.query_sets.items())
    searched = f"Searched {plan.num_searched:,} training images for the nearest to {queries}."
    for message in (searched, *notes):
        context.reporter.message(message)
    meta: dict[str, Any] = {
        "inputs": results.digests(),
        "networks": {network.name: network.digest for network in plan.networks},
        "settings": asdict(plan.config),
        "seed": plan.seed,
    }
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
    references = choose_references(config.reference, sizes)
    num_reference = min(sizes[split] for split in references)
    num_compared = min(inputs.samples.count, num_reference, config.max_images)
    if not num_compared:
        raise UserError(
            "evaluate needs 1 or more samples and 1 or more reference images, "
            f"got {inputs.samples.count} samples and {num_reference} {' and '.join(references)} images.",
            where=inputs.samples_folder,
            fix="Set sample.count to 1 or more. If the images are missing, see rejected.csv in the shards, or set "
            "evaluate.reference to another split.",
            code=4,
        )
    num_ladder = min(config.ladder_images, num_compared, min(sizes[references[0]], config.max_images) // 2)
    has_ladder = num_ladder > 1  # no metric compares single images
    num_queries = max(1, min(num_compared, _images_in_memory(inputs)))
    query_sets = {"samples": num_queries}
    if not has_few_validation_images(sizes):  # validation images show which distance is normal
        query_sets["validation"] = min(num_queries, sizes["validation"])
    return EvaluationPlan(
        references=references,
        query_sets=query_sets,
        num_compared=num_compared,
        num_searched=min(config.search_images or sizes["train"], sizes["train"]),
        num_examples=min(RECONSTRUCTIONS_SHOWN, sizes[references[0]]),
        num_rated=min(config.codec_images or config.max_images, config.max_images, sizes[references[0]]),
        num_ladder=num_ladder if has_ladder else 0,
        redrawn_levels=tuple(inputs.codes.levels)[1:] if has_ladder else (),
        networks=tuple(network.absolute() for network in read_networks(config.networks)),
        config=config,
        seed=seed,
    )


def _images_in_memory(inputs: EvaluationInputs) -> int:
    return MAX_SEARCH_BYTES // (3 * inputs.shards.image_size**2)


def _pairs(plan: EvaluationPlan) -> dict[str, SetPair]:
    """Return the pairs of image sets to compare, by the name of their metrics."""
    compared = {name: SetPair(plan.reference, name) for name in COMPARED_SETS}
    # FID* of Razavi et al. 2019: both sides are decoder outputs, so the decoder's own error cancels.
    compared["samples_to_reconstructions"] = SetPair("reconstructions", "samples")
    for reference in plan.references[1:]:
        compared |= {f"{name}_to_{reference}": SetPair(reference, name) for name in COMPARED_SETS}
    return compared


def _parts(inputs: EvaluationInputs, plan: EvaluationPlan) -> Iterator[Part]:
    """Yield the parts, each a computation on a range of images. The slowest come first, so workers finish together."""
    sizes = {split: len(inputs.images(split)) for split in ("train", "validation")}
    cuts = {plan.reference: plan.num_rated}  # a part ends here, so that parts sum over exactly the rated images
    limits = {split: min(plan.config.max_images, size) for split, size in sizes.items() if size}
    for level in plan.redrawn_levels:
        redrawn = ladder.REDRAWN + level
        yield from _ranges("features", redrawn, plan.num_ladder, ladder.IMAGES_PER_PART, network=plan.networks[0].name)
    for network in plan.networks:
        for image_set, count in plan.feature_sets.items():
            yield from _ranges("features", image_set, count, network=network.name)
    for split, size in limits.items():
        for level in reversed(list(inputs.codes.levels)):
            yield from _ranges("likelihood", split, size, cut=cuts.get(split), level=level)
    for split, size in limits.items():
        yield from _ranges("distortion", split, size, cut=cuts.get(split))
    if plan.config.codec_images:
        yield from _ranges("codecs", plan.reference, plan.num_rated, COMPRESSED_PER_PART)
    yield from _ranges("nearest_pixels", "train", plan.num_searched, _search_images(inputs))
    yield from _ranges("examples", plan.reference, plan.num_examples)
    for level, grid in inputs.codes.levels.items():
        yield from _ranges("codebook", level, grid.entries)


def _search_parts(inputs: EvaluationInputs, plan: EvaluationPlan) -> Iterator[Part]:
    """Yield the parts that need the features of the image sets."""
    for network in plan.networks:
        yield from _ranges("nearest_features", "train", plan.num_searched, _search_images(inputs), network=network.name)


def _search_images(inputs: EvaluationInputs) -> int:
    """Return the number of training images that a part searches: their pixels are in memory."""
    return max(1, min(SEARCH_IMAGES_PER_PART, _images_in_memory(inputs)))


def _write_features(folder: Path, results_folder: Path, parts: list[Part]) -> None:
    """Write the features of each image set as one file, from those of its parts."""
    files: dict[str, list[Path]] = {}
    for part in parts:
        if part["task"] == "features":
            name = feature_name(part["network"], part["image_set"])
            files.setdefault(name, []).append(part_path(results_folder, part))
    write_features(folder, files)


def _ranges(
    task: str,
    image_set: str,
    size: int,
    images_per_part: int = IMAGES_PER_PART,
    *,
    cut: int | None = None,
    **extra: str,
) -> Iterator[Part]:
    """Yield parts of at most `images_per_part` images. No part has images before and after `cut`."""
    starts = {*range(0, size, images_per_part), *([cut] if cut and cut < size else [])}
    for start, stop in pairwise([*sorted(starts), size]):
        yield {
            "task": task,
            **extra,
            "image_set": image_set,
            "start": start,
            "stop": stop,
            "weight": stop - start,
        }
