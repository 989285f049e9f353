"""Restoration: codes above a threshold are drawn again, the others stay."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.config import PriorConfig
from models.priors import PRIORS, Grid, Prior, build, nll
from models.restoration import restore
from models.sampling import SamplingRule, draw

COARSER = {"top": Grid(5, 3, 2)}
SAMPLE_IDS = torch.tensor([0, 1, 5])


@pytest.fixture(params=PRIORS)
def prior(request) -> Prior:
    """A prior with random weights whose entries are not equally probable."""
    torch.manual_seed(0)
    config = PriorConfig(request.param, 8, 12, 4, 2, 2, 5, 0.1, 1, 1)
    network = build(config, entries=11, grid=(6, 4), coarser=COARSER, classes=3).double().eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network


@pytest.fixture
def conditions() -> dict[str, object]:
    return {"coarser": {"top": torch.randint(0, 5, (3, 3, 2))}, "labels": torch.tensor([0, 2, 1])}


@pytest.fixture
def codes() -> Tensor:
    return torch.randint(0, 11, (3, 6, 4))


def code_nll(prior: Prior, codes: Tensor, conditions) -> Tensor:
    return F.cross_entropy(prior(codes, **conditions).detach(), codes, reduction="none")


def test_infinite_threshold_copies_all_codes(prior: Prior, codes: Tensor, conditions):
    """No code is less likely than impossible."""
    restored = restore(prior, codes, threshold=math.inf, seed=0, sample_ids=SAMPLE_IDS, **conditions)
    assert torch.equal(restored, codes)


def test_negative_threshold_draws_all_codes_as_a_sampler_does(prior: Prior, codes: Tensor, conditions):
    """The noise of a position is that of sampling with the same seed, and so is the sampling rule."""
    rule = SamplingRule(0.8, 5, 0.9)
    restored = restore(prior, codes, threshold=-1.0, seed=3, sample_ids=SAMPLE_IDS, rule=rule, **conditions)
    drawn = draw(prior, seed=3, sample_ids=SAMPLE_IDS, **rule._asdict(), **conditions)
    assert torch.equal(restored, drawn)


def test_each_code_is_compared_given_the_restored_codes_before_it(prior: Prior, codes: Tensor, conditions):
    """A restored grid follows from a second pass: where a code stays it is likely, where it changes it was not."""
    threshold = code_nll(prior, codes, conditions).quantile(0.7).item()
    restored = restore(prior, codes, threshold=threshold, seed=0, sample_ids=SAMPLE_IDS, **conditions)
    assert not torch.equal(restored, codes)
    logits = prior(restored, **conditions).detach()  # each position sees the restored codes before it
    nats_of_input = F.cross_entropy(logits, codes, reduction="none")
    assert ((restored == codes) | (nats_of_input > threshold)).all()


def test_codes_before_the_first_unlikely_one_stay(prior: Prior, codes: Tensor, conditions):
    """Up to the first code above the threshold, the scores are those of the input."""
    nats = code_nll(prior, codes, conditions).flatten(1)
    threshold = nats.median().item()
    first = (nats > threshold).int().argmax(1)
    restored = restore(prior, codes, threshold=threshold, seed=0, sample_ids=SAMPLE_IDS, **conditions)
    for index, position in enumerate(first):
        assert torch.equal(restored[index].flatten()[:position], codes[index].flatten()[:position])


def test_restored_grids_do_not_depend_on_the_batch(prior: Prior, codes: Tensor, conditions):
    """One grid alone is restored as in a batch."""
    arguments = {"threshold": 2.0, "seed": 0}
    together = restore(prior, codes, sample_ids=SAMPLE_IDS, **arguments, **conditions)
    alone = {"coarser": {"top": conditions["coarser"]["top"][2:]}, "labels": conditions["labels"][2:]}
    assert torch.equal(restore(prior, codes[2:], sample_ids=SAMPLE_IDS[2:], **arguments, **alone), together[2:])


def test_codes_that_do_not_fit_the_prior_are_refused(prior: Prior, codes: Tensor, conditions):
    """The error has both sizes."""
    with pytest.raises(ValueError, match="grids of 6 x 4, as this prior was built, got 5 x 4"):
        restore(prior, codes[:, :5], threshold=0.0, seed=0, sample_ids=SAMPLE_IDS, **conditions)


@pytest.mark.slow
def test_planted_defects_are_scored_above_all_other_codes_and_repaired():
    """A prior trained on checkerboards finds a wrong code in each, and restores the checkerboard."""
    torch.manual_seed(0)
    prior = build(PriorConfig("pixelcnn", 16, 16, 2, 0, 1, 3, 0.0, 1, 0), entries=4, grid=(6, 6), coarser={}, classes=0)
    rows, columns = torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij")
    boards = torch.stack([(rows + columns + phase) % 2 for phase in (0, 1)])  # of the entries 0 and 1
    optimizer = torch.optim.Adam(prior.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nll(prior(boards), boards).mean().backward()
        optimizer.step()
    prior.eval()
    intact, defective = boards[[0, 1] * 8], boards[[0, 1] * 8].clone()
    positions = torch.randint(0, 36, (16,))
    defective.flatten(1)[torch.arange(16), positions] += 2
    nats = code_nll(prior, defective, {}).flatten(1)
    assert nats.argmax(1).tolist() == positions.tolist()
    restored = restore(prior, defective, threshold=math.log(4), seed=0, sample_ids=torch.arange(16))
    assert (restored == intact).flatten(1).all(1).float().mean() > 0.8  # a new first code may begin the other board
