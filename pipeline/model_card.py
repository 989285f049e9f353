"""Model card of an exported model: Markdown with the front matter that the Hugging Face hub reads."""

import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from ruamel.yaml import YAML

from models.cost import count_parameters
from stages.config import SampleConfig
from stages.formats import curves
from stages.inference.trained_models import TrainedModels

TEMPLATE = Path(__file__).with_name("model_card.md.j2")
UNKNOWN_LICENSE = "unknown"  # a value that the hub accepts
# The hub has no tag for class-conditional generation; this one is for models without a text as input.
PIPELINE_TAG = "unconditional-image-generation"


@dataclass(frozen=True)
class CardFacts:
    """Facts for the card that are not part of the networks."""

    title: str
    version: str  # of this package
    license: str  # identifier of the hub, such as "mit"
    dataset: str  # name; "" if it is not known
    data_note: str  # a sentence on the training images
    metrics: Mapping[str, float]  # by name; empty if the model has not been evaluated
    feature_network: str  # whose features the metrics of the samples compare
    samples: str  # caption of samples.png; "" without it
    digests: Mapping[str, str]  # of the artifacts, and of the data that they were trained on


def render_card(models: TrainedModels, folder: Path, sampling: SampleConfig, facts: CardFacts) -> str:
    """Return the card of a model. `folder` holds `vqvae/` and, if the model has them, `priors/`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent),
        autoescape=False,  # Markdown: texts of the user are escaped by `_escape`
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    levels = _levels(models, folder)
    text = environment.get_template(TEMPLATE.name).render(
        front_matter=_front_matter(facts, list(models.vqvae.config.levels)),
        title=_escape(facts.title),
        version=facts.version,
        dataset=f"the dataset {_escape(facts.dataset)}" if facts.dataset else "images",
        image_size=models.image_size,
        levels=levels,
        priors=bool(models.priors),
        classes=[_escape(name) for name in models.classes],
        samples=facts.samples,
        reconstructions=(folder / "vqvae" / "reconstructions.png").is_file(),
        shapes="{" + ", ".join(f'"{level["name"]}": (1, {level["side"]}, {level["side"]})' for level in levels) + "}",
        parameters=count_parameters(models.vqvae),
        steps=_steps(folder / "vqvae"),
        sampling=sampling,
        metrics={name: f"{value:.4g}" for name, value in facts.metrics.items()},
        feature_network=facts.feature_network,
        data_note=_escape(facts.data_note),
        digests=facts.digests,
        license_note=_license_note(facts.license),
    )
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def _front_matter(facts: CardFacts, levels: Sequence[str]) -> str:
    """Return the metadata as YAML. The hub shows the metrics of `model-index` beside the card."""
    metadata: dict[str, Any] = {
        "license": facts.license,
        "library_name": "vqvae2",
        "pipeline_tag": PIPELINE_TAG,
        "tags": ["vq-vae-2", "vq-vae", "autoregressive", "image-generation"],
    }
    if facts.metrics:
        dataset = {"name": facts.dataset or "images", "type": re.sub(r"[^\w.-]", "-", facts.dataset) or "images"}
        metrics = [{"name": name, "type": name, "value": value} for name, value in facts.metrics.items()]
        result = {"task": {"type": PIPELINE_TAG}, "dataset": dataset, "metrics": metrics}
        metadata["model-index"] = [{"name": facts.title, "results": [result]}]
    yaml, buffer = YAML(), io.StringIO()
    yaml.default_flow_style = False
    yaml.width = 10_000  # one line per value
    yaml.dump(metadata, buffer)
    return buffer.getvalue()


def _levels(models: TrainedModels, folder: Path) -> list[dict[str, Any]]:
    """Describe each level, coarse to fine, for the table of the card."""
    sides = models.vqvae.config.grids(models.image_size)
    return [
        {
            "name": name,
            "side": sides[name],
            "entries": level.entries,
            "dim": level.dim,
            "prior": _prior(models, folder, name) if models.priors else None,
        }
        for name, level in models.vqvae.config.levels.items()
    ]


def _prior(models: TrainedModels, folder: Path, level: str) -> dict[str, Any]:
    prior = models.priors[level]
    return {
        "name": type(prior).__name__,
        "layers": len(prior.blocks),
        "channels": prior.embedding.embedding_dim,
        "parameters": count_parameters(prior),
        "steps": _steps(folder / "priors" / level),
    }


def _steps(folder: Path) -> int:
    """Return the training steps of a network, from its curves; 0 if it has none."""
    return max((step for step, _, _ in curves.read(folder / curves.FILE)), default=0)


def _escape(text: str) -> str:
    """Escape what has a meaning in Markdown or HTML: a class may have any name."""
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _license_note(license_id: str) -> str:
    if license_id == UNKNOWN_LICENSE:
        return (
            "Not stated. Whoever trained this model decides on it, within the licence of the training images: "
            "state it in the first lines of this file before you publish the model."
        )
    return f"{license_id}, as stated by whoever exported this model."
