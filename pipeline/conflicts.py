"""Conflicts between settings that are valid on their own, and `Problem`, which describes any invalid setting."""

import os
import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import PurePosixPath
from typing import NamedTuple
from urllib.parse import urlsplit

from pipeline.text import capitalize
from stages.cluster_config import ClusterConfig
from stages.config import Params, SampleConfig, TrainConfig
from stages.errors import install_command

# Artifacts with images: those that a classifier can be trained on, and those that a rejection can select from.
CLASSIFIER_ARTIFACTS = ("shards", "vqvae", "samples", "accepted")
REJECTION_ARTIFACTS = ("samples",)
# DVC takes a path that begins with one of its schemes for a URL, also without slashes.
URL = re.compile(r"([a-z][\w+.-]*)://|(https?|s3|gs|azure|ssh|hdfs|webhdfs|webdavs?|oss|gdrive|remote):", re.IGNORECASE)


class Problem(NamedTuple):
    """One invalid setting."""

    key: str  # full key, such as "cluster.workers"; "" for the settings as a whole
    headline: str  # the violated rule and the value
    fix: str


def explain(error: ValueError, section: str = "") -> Problem:
    """Convert the ValueError of a settings class, "{field} must be {rule}, got {value}[; {fix}]".

    `section` becomes the prefix of the field. Without a fix the rule becomes one: "Set cluster.workers to 1 or more."
    """
    sentence, _, fix = str(error).partition("; ")
    match = re.match(r"([\w.]+) must be (.+), got ", sentence)
    fix = f"{capitalize(fix)}." if fix else ""
    if not match:
        return Problem(section, f"{capitalize(sentence)}.", fix or "Choose values that are valid together.")
    key = f"{section}.{match[1]}".lstrip(".")
    rule = f"a value {match[2]}" if match[2].startswith(("above ", "below ", "at ")) else match[2]
    return Problem(key, f"{key}{sentence[match.end(1) :]}.", fix or f"Set {key} to {rule}.")


def conflicts(params: Params) -> Iterator[Problem]:
    """Yield settings that are valid alone and contradict another section."""
    levels, priors = params.vqvae.levels, params.priors
    yield from _not_local("dataset.source", params.dataset.source)
    try:
        params.vqvae.grids(params.dataset.image_size)
    except ValueError as error:
        yield explain(error, "dataset")
    headline = f"priors must have the levels of vqvae.levels ({', '.join(levels)}), got {', '.join(priors) or 'none'}."
    for level in levels:
        if level not in priors:
            yield Problem("priors", headline, f"Add the prior of {level}: -S '+prior@priors.{level}=pixelcnn'")
    for level in priors:
        if level not in levels:
            yield Problem(
                f"priors.{level}",
                headline,
                f"Add {level} to vqvae.levels, or remove its prior: -S '~prior@priors.{level}'",
            )
    entries = {name: level.entries for name, level in levels.items()}
    yield from top_k_problems(params.sample, entries, "sample.", "sample.level_rules.")
    yield from _sampling_conflicts(params)
    yield from _cluster_conflicts(params)
    yield from _classifier_conflicts(params)


def _sampling_conflicts(params: Params) -> Iterator[Problem]:
    """Yield problems of the sampling rules of levels."""
    levels = params.vqvae.levels
    for level in params.sample.level_rules:
        key = f"sample.level_rules.{level}"
        if level not in levels:
            headline = f"sample.level_rules must name levels of vqvae.levels ({', '.join(levels)}), got {level}."
            yield Problem(key, headline, f"Remove {key}, or use one of these names.")
    for level, prior in params.priors.items():
        guidance = params.sample.rule(level)["guidance"]
        if guidance != 1 and not prior.network.label_dropout:
            yield Problem(
                f"priors.{level}.network.label_dropout",
                f"priors.{level}.network.label_dropout must be above 0 for a guidance of {guidance:g}, got 0.",
                f"Add: -S priors.{level}.network.label_dropout=0.1. Or set sample.guidance to 1.",
            )


def _classifier_conflicts(params: Params) -> Iterator[Problem]:
    """Yield problems of classifiers and rejections, which name the artifacts that they read."""
    for section, names in (("classifiers", CLASSIFIER_ARTIFACTS), ("rejections", REJECTION_ARTIFACTS)):
        for name in getattr(params, section):
            if name not in names:
                headline = f"{section} must be named after artifacts with images ({', '.join(names)}), got {name}."
                yield Problem(f"{section}.{name}", headline, f"Remove {section}.{name}, or use one of these names.")
    if params.rejections and "shards" not in params.classifiers:
        yield Problem(
            "rejections",
            "rejections need a critic, the classifier of real images, got none.",
            "Add it: -S +classifier@classifiers.shards=small",
        )
    if "accepted" in params.classifiers and not params.rejections:
        yield Problem(
            "classifiers.accepted",
            "classifiers.accepted needs accepted samples, got no rejection.",
            "Add it: -S +rejection@rejections.samples=half",
        )
    for name, classifier in params.classifiers.items():
        key = f"classifiers.{name}"
        if classifier.network.name == "residual" and classifier.network.stride > params.dataset.image_size:
            yield Problem(
                f"{key}.network.halvings",
                f"{key}.network must have a stride of at most dataset.image_size, which is "
                f"{params.dataset.image_size}, got {classifier.network.stride}.",
                f"Lower {key}.network.halvings or {key}.network.stem_stride.",
            )


def _not_local(key: str, path: str) -> Iterator[Problem]:
    """Describe a path that DVC would not read on this machine: a URL, or ~, which only a shell replaces."""
    if match := URL.match(path):
        local = f"data/{PurePosixPath(urlsplit(path).path).name or 'images'}"
        fix = f"Download it and track it: dvc import-url {path} {local}. Then set {key} to {local}."
        if (match[1] or match[2]).lower() == "s3":
            fix += f" S3 needs: {install_command('s3')}"
        yield Problem(key, f"{key} must be a path on this machine, got the URL {path}.", fix)
    elif re.match("~[^/]*(/|$)", path):
        expanded = os.path.expanduser(path)  # noqa: PTH111  # Path raises an error for an unknown user
        fix = f"Set {key} to {expanded}." if expanded != path else f"For a folder of this name: ./{path}"
        yield Problem(key, f"{key} must be a path without ~, got {path}.", fix)


def top_k_problems(
    sample: SampleConfig, entries: Mapping[str, int], section: str = "", level_section: str = ""
) -> Iterator[Problem]:
    """Yield each top-k above the entries of its codebook, or of the largest one if it is of all levels.

    `entries` are those of each level. The sections are prefixes of the keys: none for options of the command line.
    """
    largest = max(entries.values())
    rules = [(f"{section}top_k", sample.top_k, largest, "the largest codebook")]
    for level, rule in sample.level_rules.items():
        if level in entries:  # else another problem
            key = f"{level_section}{level}.top_k"
            rules.append((key, rule.top_k or 0, entries[level], f"the codebook of {level}"))
    for key, top_k, limit, codebook in rules:
        if top_k > limit:
            headline = f"{key} must be at most {limit}, the entries of {codebook}, got {top_k}."
            yield Problem(key, headline, f"Set {key} to 1 to {limit}, or to 0 to keep all entries.")


def stage_names(params: Params) -> list[str]:
    """List the names that cluster.stages accepts: kinds of stages, and the stages of levels and artifacts."""
    return [
        *("shard", "vqvae", "codes", "prior", *(f"prior_{level}" for level in params.vqvae.levels)),
        *("sample", "evaluate", "classifier", *(f"classifier_{name}" for name in CLASSIFIER_ARTIFACTS)),
        *("reject", *(f"reject_{name}" for name in REJECTION_ARTIFACTS)),
    ]


def trainings(params: Params) -> dict[str, tuple[str, TrainConfig]]:
    """Return the section of each training and its settings, by the name of the stage in commands."""
    return {
        "vqvae": ("train_vqvae", params.train_vqvae),
        **{f"prior_{level}": (f"priors.{level}.train", prior.train) for level, prior in params.priors.items()},
        **{
            f"classifier_{name}": (f"classifiers.{name}.train", classifier.train)
            for name, classifier in params.classifiers.items()
        },
    }


def _cluster_conflicts(params: Params) -> Iterator[Problem]:
    """Yield names in cluster.stages that are no stages, and batches with fewer images than workers."""
    names = stage_names(params)
    for name in params.cluster.stages:
        if name not in names:
            key = f"cluster.stages.{name}"
            close = get_close_matches(name, names, n=1)
            fix = f"Did you mean cluster.stages.{close[0]}?" if close else f"Remove {key}, or use one of these names."
            yield Problem(key, f"cluster.stages must name stages ({', '.join(names)}), got {name}.", fix)
    for stage, (section, train) in trainings(params).items():
        cluster, workers_key = params.cluster.for_stage(stage), _workers_key(params.cluster, stage)
        workers = cluster.max_workers
        if train.batch_size < workers:
            value = workers if isinstance(cluster.workers, int) else f"up to {workers}"
            key = f"{section}.batch_size"
            yield Problem(
                key,
                f"{key} must be at least {workers_key}, which is {value}, got {train.batch_size}.",
                f"Set {key} to {workers} or more, or lower {workers_key}.",
            )


def _workers_key(cluster: ClusterConfig, stage: str) -> str:
    """Return the key of the setting that a stage has its number of workers from."""
    for name in (stage, stage.partition("_")[0]):
        if name in cluster.stages and cluster.stages[name].workers is not None:
            return f"cluster.stages.{name}.workers"
    return "cluster.workers"
