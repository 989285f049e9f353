"""KID and Fréchet distance against torchmetrics and known Gaussians."""

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from stages.metrics import distance, pairs


def _features(count: int, mean: float = 0.0, size: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 1, (count, size)).astype(np.float32)


def _kid(reference: np.ndarray, images: np.ndarray, seed: int) -> tuple[float, float]:
    return distance.kid(pairs.compare(reference, images, k=1, seed=seed))


def test_kid_equals_torchmetrics():
    """The value equals torchmetrics' unbiased estimate over all pairs."""
    reference, images = _features(40), _features(40, 0.3, seed=1)
    expected = poly_mmd(torch.from_numpy(reference).double(), torch.from_numpy(images).double()).item()
    assert _kid(reference, images, 0)[0] == pytest.approx(expected, rel=1e-9)


def test_kid_is_unbiased_and_its_standard_error_matches_the_spread():
    """Between sets of one distribution, the values have mean 0 and a spread close to the standard errors."""
    results = np.array([_kid(_features(60, seed=2 * s), _features(60, seed=2 * s + 1), s) for s in range(40)])
    values, errors = results.T
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(len(values))
    assert 0.5 < errors.mean() / values.std() < 2


def test_kid_is_deterministic_for_a_seed():
    """The random halves of the standard error depend on the seed only."""
    reference, images = _features(20), _features(20, seed=1)
    assert _kid(reference, images, 3) == _kid(reference, images, 3)


def test_kid_accepts_sets_of_different_sizes():
    """The value and its standard error are finite for sets of different sizes."""
    assert np.isfinite(_kid(_features(7), _features(12), 0)).all()


@pytest.mark.parametrize(("count", "other"), [(40, 40), (40, 60)])
def test_frechet_equals_torchmetrics(count, other):
    """The distance equals torchmetrics' matrix square root for covariances of full rank."""
    reference, images = _features(count), _features(other, 0.5, seed=1) * 1.5
    moments = []
    for features in (reference, images):
        tensor = torch.from_numpy(features).double()
        moments += [tensor.mean(0), tensor.T.cov()]
    assert distance.frechet(reference, images) == pytest.approx(_compute_fid(*moments).item(), rel=1e-9)


def test_frechet_of_fewer_images_than_features_is_finite():
    """With singular covariances, equal sets have distance 0, and a shift of the mean gives its squared length."""
    reference = _features(5, size=50)
    assert distance.frechet(reference, reference) == pytest.approx(0, abs=1e-6)
    assert distance.frechet(reference, reference + 2) == pytest.approx(4 * 50, rel=1e-6)


def test_frechet_of_several_chunks_equals_that_of_one(monkeypatch):
    """More images than fit into memory at once give the same distance as all at once."""
    reference, images = _features(45), _features(45, 0.5, seed=1)
    expected = distance.frechet(reference, images)
    monkeypatch.setattr(distance, "CHUNK_ROWS", 7)
    assert distance.frechet(reference, images) == pytest.approx(expected, rel=1e-9)


def test_single_image_is_refused():
    """Both distances need two or more images of each set."""
    with pytest.raises(ValueError, match=r"Fréchet distance must have 2 or more .* got 1 reference images and 5"):
        distance.frechet(_features(1), _features(5))
    with pytest.raises(ValueError, match="KID must have 2 or more images of each set, got 1 reference images and 5"):
        _kid(_features(1), _features(5), 0)
