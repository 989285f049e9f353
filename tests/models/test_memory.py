"""Memory counted on fake tensors: known sizes and lifetimes."""

import torch
from torch import nn

from models.memory import count_memory

MIB = 2**20


def test_bytes_are_counted_until_they_are_freed():
    """A view has no memory of its own. The peak includes temporary results."""
    with count_memory() as counter:
        tensor = torch.empty(MIB)
        view = tensor.view(-1, 2)
        assert counter.current_bytes == 4 * MIB
        doubled = (view + 1) * 2
        assert (counter.current_bytes, counter.peak_bytes) == (8 * MIB, 12 * MIB)
        del tensor, view
        assert counter.current_bytes == 4 * MIB
        del doubled
        assert counter.current_bytes == 0


def test_activations_are_kept_for_the_backward_pass():
    """Ten linear layers keep their outputs; the backward pass frees them and leaves gradients."""
    with count_memory() as counter:
        network = nn.Sequential(*[nn.Linear(128, 128, bias=False) for _ in range(10)])
        parameters = counter.current_bytes
        assert parameters == 10 * 128 * 128 * 4
        loss = network(torch.empty(32, 128)).sum()
        assert counter.current_bytes - parameters >= 10 * 32 * 128 * 4
        loss.backward()
        del loss
        assert counter.current_bytes == 2 * parameters


def test_nothing_is_allocated():
    """A network of a hundred terabytes is counted in a moment."""
    with count_memory() as counter:
        nn.Linear(5_000_000, 5_000_000, bias=False)
        assert counter.peak_bytes == 100e12
