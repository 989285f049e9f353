"""Tests of benchmarks/anomaly.py, the example of planted defects."""

import io

import numpy as np
import pytest
from PIL import Image

import vqvae2
from benchmarks import anomaly
from stages.formats.shards import open_shards
from tests.mini_pipeline import MiniPipeline


@pytest.mark.parametrize("defect", anomaly.DEFECTS)
def test_mask_of_a_defect_is_what_it_changes(defect: str):
    """Pixels outside of the mask are those of the intact image, whose index is returned."""
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    defective, masks, indices = anomaly.plant(images, defect, seed=1)
    assert np.array_equal((defective != images[indices]).any(-1), masks) and masks.any((1, 2)).all()


def test_area_counts_the_pairs_in_the_right_order():
    """The probability that a positive scores above a negative; ties count half."""
    positives, negatives = np.array([0.1, 0.7, 0.7]), np.array([0.1, 0.2])
    pairs = [(a > b) + (a == b) / 2 for a in positives for b in negatives]
    assert anomaly.area(positives, negatives) == pytest.approx(np.mean(pairs))


def test_example_measures_and_draws_a_finished_model(finished_pipeline: MiniPipeline):
    """Each score has a number per image and a map; the picture has a row per defect."""
    model = vqvae2.load(finished_pipeline.folder / "artifacts", device="cpu")
    split = open_shards(model.folder / "shards").split("validation")
    images = np.stack([split.read(position) for position in range(len(split))])
    for per_image, maps in anomaly.measure(model, images).values():
        assert per_image.shape == (4,) and maps.shape == (4, 16, 16)
    with Image.open(io.BytesIO(anomaly.draw(model, images, seed=0))) as picture:
        assert picture.size == (7 * (3 * 16 + 2) + 2, 3 * (3 * 16 + 2) + 2)
