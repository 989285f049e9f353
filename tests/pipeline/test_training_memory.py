"""Memory of training, counted for the settings of a run."""

import dataclasses
from pathlib import Path

import pytest

from models.config import ClassifierConfig
from pipeline import params
from pipeline.training_memory import GB, TrainingMemory, count_all, lines
from stages.cluster_config import ClusterConfig, StageClusterConfig
from stages.config import ClassifierStageConfig, Params, PriorStageConfig
from tests.mini_pipeline import CLASSIFIER, NETWORK, PRIORS, TRAIN

ROOT = Path(__file__).parents[2]


def small_settings(workers: int = 1, **train: object) -> Params:
    """Settings of the small networks of tests, with other settings of their trainings."""
    settings = params.load(ROOT / "params.yaml")
    config = dataclasses.replace(TRAIN, **train)  # type: ignore[arg-type]
    return dataclasses.replace(
        settings,
        dataset=dataclasses.replace(settings.dataset, image_size=16),
        vqvae=NETWORK,
        train_vqvae=config,
        priors={level: PriorStageConfig(network, config) for level, network in PRIORS.items()},
        classifiers={"shards": ClassifierStageConfig(CLASSIFIER.network, config)},
        cluster=ClusterConfig(workers=workers),
    )


def test_state_grows_with_the_settings_that_need_it():
    """Two workers add DDP's copy of the gradients; without an EMA there is no copy of the weights."""
    for alone, shared in zip(
        count_all(small_settings(), 2), count_all(small_settings(2, ema_decay=0.0), 2), strict=True
    ):
        weights = alone.weights
        assert (alone.gradients, alone.optimizer, alone.ema) == (weights, 2 * weights, weights)
        assert (shared.gradients, shared.optimizer, shared.ema) == (2 * weights, 2 * weights, 0)
        assert alone.state == 5 * weights == shared.state
        assert (alone.share, shared.share) == (4, 2)


def test_share_is_that_of_the_stages_own_workers():
    """One worker trains a prior of two levels; the other trainings have two."""
    settings = small_settings(2)
    cluster = dataclasses.replace(settings.cluster, stages={"prior_top": StageClusterConfig(workers=1)})
    counted = count_all(dataclasses.replace(settings, cluster=cluster), 2)
    assert {memory.stage: memory.share for memory in counted} == {
        "vqvae": 2,
        "prior_top": 4,
        "prior_bottom": 2,
        "classifier_shards": 2,
    }


def test_of_a_range_of_workers_the_fewest_have_the_largest_shares():
    """With more than one at times, DDP's copy of the gradients counts too."""
    settings = small_settings()
    cluster = dataclasses.replace(settings.cluster, workers=(1, 2))
    for memory in count_all(dataclasses.replace(settings, cluster=cluster), 2):
        assert (memory.share, memory.gradients) == (4, 2 * memory.weights)


def test_every_training_is_counted_and_recomputing_needs_less():
    """The VQ-VAE, each prior and each classifier; the micro-batch is the setting or the share."""
    plain = list(count_all(small_settings(microbatch=3), 2))
    recomputed = list(count_all(small_settings(microbatch="auto", recompute_activations=True), 2))
    assert [memory.stage for memory in plain] == ["vqvae", "prior_top", "prior_bottom", "classifier_shards"]
    for left, right in zip(plain, recomputed, strict=True):
        assert (left.microbatch, right.microbatch) == (3, 4)
        assert 0 < right.next_image <= left.next_image
    assert recomputed[2].next_image < plain[2].next_image


@pytest.mark.parametrize(
    ("card_gb", "images"),
    [(9, 0), (12, 1), (20, 5), (1000, 8)],  # 10 % of the card is left for CUDA
)
def test_the_largest_micro_batch_fits_the_card(card_gb: int, images: int):
    """8 GB of state, 2 GB for the first image, 1.9 GB for each further one, and a share of eight images."""
    parts = [round(part * GB) for part in (2, 2, 4, 0, 2, 1.9)]
    memory = TrainingMemory("prior_top", *parts, share=8, microbatch=4)
    assert memory.largest_microbatch(card_gb * GB) == images
    if 0 < images < memory.share:
        assert memory.total(images) <= 0.9 * card_gb * GB < memory.total(images + 1)


def test_the_table_has_a_row_per_training():
    """In GB, with the largest micro-batch of each card."""
    memory = TrainingMemory("prior_top", *(round(part * GB) for part in (2, 2, 4, 2, 15, 2)), share=8, microbatch=4)
    heading, names, row = lines([memory], 14)
    assert "GB per GPU" in heading and names.split()[-6:] == ["24", "GB", "40", "GB", "80", "GB"]
    assert row.split() == ["prior_top", "2.0", "2.0", "4.0", "2.0", "21.0", "31.0", "4", "none", "6", "8"]


def test_a_frozen_network_keeps_no_activations():
    """An image of 260 pixels adds 40 MB at most: what single layers of the pretrained network use for a moment."""
    settings = small_settings()
    pretrained = ClassifierStageConfig(
        ClassifierConfig(name="efficientnet_lite2"), settings.classifiers["shards"].train
    )
    *_, memory = count_all(dataclasses.replace(settings, classifiers={"shards": pretrained}), 2)
    assert round(memory.weights / 4e6, 1) == 4.8 and memory.next_image < 40e6
    assert memory.optimizer == 2 * memory.gradients < 0.01 * memory.weights  # of the linear layer only


@pytest.mark.filterwarnings("error::UserWarning")
def test_classifier_without_classes_is_counted():
    """The images may be absent. A layer without outputs, whose weights PyTorch warns of, is not built."""
    *_, classifier = count_all(small_settings(), 0)
    assert classifier.stage == "classifier_shards" and classifier.weights > 0
