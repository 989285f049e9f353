"""Exported model: a folder for other machines and for the Hugging Face hub.

    README.md        model card
    config.json      settings of the networks, classes, sampling rule and digests
    samples.png      contact sheet of samples
    vqvae/           the artifacts as they are: their digests stay the same, so codes of this VQ-VAE remain valid
    priors/LEVEL/

Equal models give equal bytes. The folder is a model folder like `artifacts/`: every command and `vqvae2.load` read it.
"""

import importlib.metadata
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.model_card import CardFacts, render_card
from pipeline.text import first_few
from stages.config import SampleConfig
from stages.errors import UserError
from stages.evaluation import summary
from stages.formats import artifact
from stages.formats.artifact import Artifact
from stages.formats.samples import open_samples
from stages.images.contact_sheet import contact_sheet
from stages.images.count import format_count
from stages.inference.folder import CONFIG, CONFIG_FORMAT, load_parts, sampling_rule
from stages.inference.trained_models import TrainedModels
from stages.metrics.networks import Network

CARD, SAMPLES = "README.md", "samples.png"
SHEET_COLUMNS = 8
MAX_SHEET_IMAGES = 64


def require_new(out: Path) -> None:
    """Raise UserError if a folder to write is a file, holds files, or is the current folder."""
    if out.resolve() == Path.cwd():
        raise UserError(
            f"{out} must be a new folder or an empty one, got the current folder.",
            where=out.absolute(),
            fix="Choose another folder, such as my-model.",
            code=2,
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        content = first_few(sorted(path.name for path in out.iterdir())) if out.is_dir() else "a file"
        raise UserError(
            f"{out} must be a new or empty folder, got {content}.",
            where=out.absolute(),
            fix="Choose another folder, or delete this one.",
            code=2,
        )


def write(folder: Path, out: Path, *, title: str, license_id: str) -> TrainedModels:
    """Write the model of a folder as `out`, which must be new or empty; return the model.

    `folder` holds `vqvae/` and, if the model has priors, `priors/`. The samples, the shards and the report beside them
    add pictures, the name of the dataset and metrics to the card, as far as they are of this model. Raises UserError if
    a part is missing, damaged or does not match the others.
    """
    require_new(out)
    models, sampling = load_parts(folder), sampling_rule(folder)
    parts = _parts(folder, models)
    for part in parts.values():
        part.verify()
    digests = {name: part.digest for name, part in parts.items()}
    samples = _samples(folder, digests)
    metrics, feature_network = _metrics(folder, digests)
    facts = CardFacts(
        title=title,
        version=importlib.metadata.version("vqvae2"),
        license=license_id,
        metrics=metrics,
        feature_network=feature_network,
        samples=samples[0] if samples else "",
        digests=digests | _data_digests(parts),
        **_describe_data(folder, parts["vqvae"]),
    )
    if out.is_dir():
        out.rmdir()  # empty
    with artifact.commit_folder(out.absolute(), "model", {"digests": digests}) as temporary:
        for name, part in parts.items():
            _copy(part, temporary / name)
        if samples:
            (temporary / SAMPLES).write_bytes(samples[1])
        config = json.dumps(_config(models, sampling, parts), indent=2, ensure_ascii=False)
        (temporary / CONFIG).write_text(config + "\n", encoding="utf-8")
        card = render_card(models, temporary, sampling, facts)
        (temporary / CARD).write_text(card, encoding="utf-8")
    return models


def _parts(folder: Path, models: TrainedModels) -> dict[str, Artifact]:
    """Return the artifacts of a model by their path in the folder."""
    parts = {"vqvae": artifact.read(folder / "vqvae", "vqvae", "vqvae")}
    for level in models.priors:
        parts[f"priors/{level}"] = artifact.read(folder / "priors" / level, "prior", f"prior_{level}")
    return parts


def _copy(part: Artifact, target: Path) -> None:
    for name in (*part.files, artifact.MANIFEST):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(part.path(name), target / name)


def _config(models: TrainedModels, sampling: SampleConfig, parts: Mapping[str, Artifact]) -> dict[str, Any]:
    networks = {name: part.meta["network"] for name, part in parts.items()}
    return {
        "format": CONFIG_FORMAT,
        "library_name": "vqvae2",
        "image_size": models.image_size,
        "classes": list(models.classes),
        "grids": models.vqvae.config.grids(models.image_size),
        "sampling": sampling.describe_rule(),
        "networks": networks,
        "digests": {name: part.digest for name, part in parts.items()},
    }


def _samples(folder: Path, digests: Mapping[str, str]) -> tuple[str, bytes] | None:
    """Return a caption and a contact sheet of the first samples; None if there are none of this model."""
    try:
        samples = open_samples(folder / "samples")
    except (UserError, OSError):
        return None
    drawn_from = {"vqvae": samples.vqvae, **{f"priors/{n}": d for n, d in samples.artifact.meta["priors"].items()}}
    if drawn_from != digests or not samples.count:
        return None
    count = min(samples.count, MAX_SHEET_IMAGES)
    samples.artifact.verify()
    sheet = contact_sheet(samples.images(0, count), columns=min(SHEET_COLUMNS, math.ceil(math.sqrt(count))))
    return f"The first {format_count(count, 'sample', 'samples')} of the pipeline", sheet


def _metrics(folder: Path, digests: Mapping[str, str]) -> tuple[dict[str, float], str]:
    """Return the metrics of the report beside a model and their feature network; none if it is of another model."""
    try:
        report = artifact.read(folder / "report", "report")
        report.verify("metrics.json")
        values = json.loads(report.path("metrics.json").read_bytes())
        inputs = {name.replace("prior ", "priors/"): digest for name, digest in report.meta["inputs"].items()}
        if any(inputs.get(name) != digest for name, digest in digests.items()):
            return {}, ""
        networks = [Network(name, "", digest) for name, digest in report.meta["networks"].items()]
        chosen = summary.headline(values, networks)
        for level, by_split in values["likelihood"].items():
            nats = by_split.get("validation", by_split["train"])
            chosen[f"nll_{level}"] = nats["nats_per_code"]
        return {name: float(value) for name, value in chosen.items()}, networks[0].name
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}, ""  # a report of another version of this package


def _data_digests(parts: Mapping[str, Artifact]) -> dict[str, str]:
    """Return the digests of the training data that the models record."""
    shards = str(parts["vqvae"].meta["shards"])  # "" for an imported VQ-VAE
    digests = {"shards (training data)": shards} if shards else {}
    codes = {f"codes of {name}": str(part.meta["codes"]) for name, part in parts.items() if name != "vqvae"}
    return digests | codes


def _describe_data(folder: Path, vqvae: Artifact) -> dict[str, str]:
    """Return the name of the dataset and a sentence on it, from the shards beside the model if they are its own."""
    if source := vqvae.meta.get("imported_from"):
        note = f"Not known: the VQ-VAE was imported from {source['file']} of {source['format']}."
        return {"dataset": "", "data_note": f"{note} SHA-256 of that file: {source['sha256']}."}
    try:
        shards = artifact.read(folder / "shards", "shards")
        if shards.digest == vqvae.meta["shards"]:
            counts = ", ".join(f"{count:,} {split}" for split, count in shards.meta["images"].items() if count)
            name = str(shards.meta["settings"]["name"])
            return {"dataset": name, "data_note": f"The dataset {name}, images by split: {counts}."}
    except (UserError, OSError):
        pass
    return {"dataset": "", "data_note": "The training images are identified by the digest of their shards."}
