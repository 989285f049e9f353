"""VQ-VAE and priors for sampling: loading, labels of samples, codes and images of a batch.

The stage, the command and the Python API draw samples with this module, so that equal seeds give equal samples.

Axes: N samples, H x W pixels or grid of codes, 3 RGB channels.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.priors import Grid, Prior
from models.sampling import Sampler
from models.vqvae import VQVAE
from stages.config import SampleConfig
from stages.errors import UserError, unknown_class
from stages.formats import model_file
from stages.images.tensors import to_uint8

# The fractional parts of its multiples are evenly spread over [0, 1) for any count: a low-discrepancy sequence.
INVERSE_GOLDEN_RATIO = 0.6180339887498949


class TrainedModels:
    """VQ-VAE and its priors, ready to sample from."""

    def __init__(self, vqvae: VQVAE, priors: Mapping[str, Prior], meta: Mapping[str, Any], digests: Mapping[str, str]):
        self.vqvae, self.priors, self.meta, self.digests = vqvae, priors, meta, digests
        self.image_size: int = meta["image_size"]
        self.classes: tuple[str, ...] = tuple(meta["classes"])
        self.label_counts: list[int] = meta["label_counts"]  # training images per class
        self.grids = {level: Grid(prior.entries, prior.height, prior.width) for level, prior in priors.items()}
        self._samplers: dict[tuple[Any, ...], Sampler] = {}

    @classmethod
    def load(cls, vqvae: Path, priors: Path) -> "TrainedModels":
        """Load a VQ-VAE and the prior of each of its levels.

        Raises UserError if a model is missing or damaged, or if a prior was trained on codes of another VQ-VAE.
        """
        network, vqvae_artifact = model_file.load_vqvae(vqvae)
        loaded, digests, label_counts = {}, {"vqvae": vqvae_artifact.digest}, []
        classes = vqvae_artifact.meta["classes"]
        for level in network.config.levels:
            prior, prior_artifact = model_file.load_prior(priors / level, level)
            if prior_artifact.meta["vqvae"] != vqvae_artifact.digest:
                raise UserError(
                    f"The prior of level {level} must be trained on codes of VQ-VAE {vqvae_artifact.digest[:12]}, "
                    f"got VQ-VAE {prior_artifact.meta['vqvae'][:12]}.",
                    where=priors / level,
                    fix=f"Run: vqvae2 run --stage prior_{level}",
                    code=5,
                )
            loaded[level], digests[level] = prior, prior_artifact.digest
            # An imported VQ-VAE knows no classes; the priors have those of the images that they were trained on.
            classes, label_counts = prior_artifact.meta["classes"], prior_artifact.meta["label_counts"]
        return cls(network, loaded, {**vqvae_artifact.meta, "classes": classes, "label_counts": label_counts}, digests)

    def to(self, device: torch.device) -> "TrainedModels":
        """Move every network to a device."""
        for network in (self.vqvae, *self.priors.values()):
            network.to(device)
        return self

    @torch.inference_mode()
    def draw(
        self, sample_ids: Sequence[int], labels: Sequence[int], config: SampleConfig, seed: int
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Draw samples: return (N, H, W) uint16 codes per level, and (N, H, W, 3) uint8 images.

        A sample depends only on its number, its label, `seed` and the models, not on the rest of the batch.
        """
        codes = self.draw_codes(sample_ids, labels, config, seed)
        images = to_uint8(self.vqvae.decode(codes).float().cpu().numpy())
        return {level: grids.cpu().numpy().astype(np.uint16) for level, grids in codes.items()}, images

    @torch.inference_mode()
    def draw_codes(
        self,
        sample_ids: Sequence[int],
        labels: Sequence[int],
        config: SampleConfig,
        seed: int,
        *,
        known_codes: Mapping[str, Tensor] | None = None,
        prefix: Mapping[str, Tensor] | None = None,
        prefix_rows: Mapping[str, int] | None = None,
    ) -> dict[str, Tensor]:
        """Draw the codes of samples, (N, H, W) int64 per level.

        `known_codes` are those of the coarsest levels, which are not drawn. The first `prefix_rows` rows of a level are
        copied from `prefix`, which holds (N, H, W) codes per level.
        """
        device = next(self.vqvae.parameters()).device
        codes: dict[str, Tensor] = dict(known_codes or {})
        for index, level in enumerate(self.priors):
            if level in codes:
                continue
            codes[level] = self._sampler(level, config).draw(
                seed=seed + index,  # independent noise per level
                sample_ids=torch.tensor(sample_ids),
                coarser=dict(codes),
                labels=torch.tensor(labels, device=device) if self.classes else None,
                prefix=None if prefix is None else prefix[level],
                prefix_rows=0 if prefix_rows is None else prefix_rows[level],
            )
        return codes

    def require_drawable(self, config: SampleConfig, where: str) -> None:
        """Raise UserError if the sampling rule does not fit the models; `where` is the place of the rule."""
        if unknown := [level for level in config.level_rules if level not in self.priors]:
            raise UserError(
                f"{unknown[0]!r} is not a level of these models.",
                where=where,
                fix=f"Use any of: {', '.join(self.priors)}",
                code=2,
            )
        for level, prior in self.priors.items():
            guidance = config.rule(level)["guidance"]
            if guidance != 1 and not prior.can_be_guided:
                raise UserError(
                    f"guidance must be 1 for level {level}, whose prior has never seen images without their class, got "
                    f"{guidance:g}.",
                    where=where,
                    fix=f"Train it on classes with: -S priors.{level}.network.label_dropout=0.1",
                    code=2,
                )

    def _sampler(self, level: str, config: SampleConfig) -> Sampler:
        """Return the sampler of a level, which keeps its caches for later draws with the same settings."""
        settings = {**config.rule(level), "method": config.method, "batch_size": config.batch_size}
        key = (level, *settings.values())
        if key not in self._samplers:
            self._samplers[key] = Sampler(self.priors[level], **settings)
        return self._samplers[key]


def choose_labels(models: TrainedModels, config: SampleConfig, where: str = "sample.classes") -> np.ndarray:
    """Assign a label to each sample, (count,): the configured classes in turn, or all classes by `config.balance`.

    The label is -1 for models without classes. `where` is the name of the option or setting that holds the classes.
    Raises UserError if a configured class is unknown to the models.
    """
    if not models.classes:
        if config.classes:
            raise unknown_class(config.classes[0], (), where)
        return np.full(config.count, -1)
    if config.classes:
        unknown = [name for name in config.classes if name not in models.classes]
        if unknown:
            raise unknown_class(unknown[0], models.classes, where)
        return np.resize([models.classes.index(name) for name in config.classes], config.count)
    if config.balance == "equal":
        return np.resize(np.arange(len(models.classes)), config.count)
    # Map points in [0, 1) to classes by the cumulative frequencies: any count has nearly the training frequencies.
    cumulative = np.cumsum(models.label_counts) / np.sum(models.label_counts)
    return np.searchsorted(cumulative, np.arange(config.count) * INVERSE_GOLDEN_RATIO % 1, side="right")
