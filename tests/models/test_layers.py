"""Activation and dropout of the priors: equal to torch's in value, gradient and distribution."""

import pytest
import torch
import torch.nn.functional as F

from models.priors.layers import dropout, elu


def test_elu_equals_torch_in_value_and_gradient():
    """The input stays as it is, because blocks add it to their output."""
    x = torch.randn(50, dtype=torch.double, requires_grad=True)
    before, weights = x.detach().clone(), torch.randn(50)
    torch.testing.assert_close(elu(x), F.elu(x), rtol=0, atol=0)
    gradients = [torch.autograd.grad((function(x) * weights).sum(), x)[0] for function in (elu, F.elu)]
    torch.testing.assert_close(*gradients)
    assert torch.equal(x, before)


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.999])
def test_dropout_zeroes_a_fraction_and_keeps_the_mean(probability: float):
    """The share of zeros is within five standard deviations, and the others are scaled by 1 / (1 - probability)."""
    torch.manual_seed(0)
    x = torch.ones(101, 999, requires_grad=True)  # not a multiple of the elements that one random integer decides
    y = dropout(x, probability, True)
    zeros = (y == 0).double().mean().item()
    assert zeros == pytest.approx(probability, abs=5 * (probability * (1 - probability) / x.numel()) ** 0.5)
    assert y[y != 0].unique().tolist() == pytest.approx([1 / (1 - probability)])
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())  # type: ignore[arg-type]


def test_dropout_with_a_probability_near_1_keeps_almost_nothing():
    """The threshold stays within the random numbers."""
    torch.manual_seed(0)
    assert (dropout(torch.ones(1000), 0.9999999, True) != 0).sum() < 10


def test_dropout_depends_on_the_seed_only():
    """Equal seeds give equal masks in any precision, another seed another one; the masks of two calls differ."""
    masks = []
    for seed, dtype in ((0, torch.float32), (0, torch.bfloat16), (1, torch.float32)):
        torch.manual_seed(seed)
        masks.append(dropout(torch.ones(999, dtype=dtype), 0.5, True) != 0)
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[2], dropout(torch.ones(999), 0.5, True) != 0)


def test_dropout_is_the_identity_outside_of_training():
    """Neither draws random numbers: the generator stays as it is."""
    x, state = torch.randn(9), torch.get_rng_state()
    assert dropout(x, 0.5, training=False) is x and dropout(x, 0.0, training=True) is x
    assert torch.equal(state, torch.get_rng_state())
