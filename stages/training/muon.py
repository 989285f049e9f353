"""Muon: momentum whose matrices are orthogonalized before each update, so that all directions learn equally fast.

M weights of one shape, each a matrix of A x B numbers; a convolution's weight is a matrix of outputs x all others.
Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; Liu et al. 2025, arXiv 2502.16982
(scale of the update).
"""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.775, 2.0315)  # of Jordan et al.: singular values reach 0.7 to 1.2 in few iterations
ITERATIONS = 5
SMALLEST_NORM = 1e-7  # a matrix of zeros has no direction


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum, for weights of two axes or more.

    torch.optim.Muon refuses the weights of convolutions. It also orthogonalizes one matrix after another in bfloat16,
    which takes longer than the rest of a step on processors without such arithmetic. This one takes all matrices of one
    shape at once, in float32. The root mean square of an update's numbers is the learning rate, as in Adam's first
    updates, so that one rate suits both; Liu et al. take 0.2 of it.
    """

    def __init__(
        self, weights: Iterable[nn.Parameter], lr: float, *, weight_decay: float = 0.0, momentum: float = 0.95
    ) -> None:
        super().__init__(weights, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the weights that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    update = self._momentum(weight, group["momentum"]).flatten(1)
                    by_shape.setdefault(update.shape, []).append((weight, update))
            for (rows, columns), pairs in by_shape.items():
                size = group["lr"] * max(rows, columns) ** 0.5  # an orthogonal matrix has the inverse root as its RMS
                updates = orthogonalize(torch.stack([update for _, update in pairs]))
                for (weight, _), update in zip(pairs, updates, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(update.view(weight.shape), alpha=-size)

    def _momentum(self, weight: Tensor, momentum: float) -> Tensor:
        """Add the gradient to the moving average; return the average as it would be after the same gradient again."""
        assert weight.grad is not None
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        average: Tensor = state["momentum_buffer"].lerp_(weight.grad, 1 - momentum)
        return weight.grad.lerp(average, momentum)


def orthogonalize(matrices: Float[Tensor, "M A B"]) -> Float[Tensor, "M A B"]:
    """Replace the singular values of each matrix by values near 1, by Newton-Schulz iterations."""
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.float()
    x = x.mT.contiguous() if is_tall else x  # the products below are over the shorter side
    x = x / x.flatten(1).norm(dim=1).clamp(min=SMALLEST_NORM)[:, None, None]  # the iterations need values up to 1
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).contiguous().to(matrices.dtype)
