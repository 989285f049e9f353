"""Muon: SGD with momentum that orthogonalizes each update, so that all directions of a matrix learn equally fast.

Axes: M matrices of one shape, A rows, B columns. A convolution's weight is a matrix with one row per output
channel, a transposed one's has one per input channel.
Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; Liu et al. 2025, arXiv 2502.16982
(scale of the update).
"""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

# Of the Newton-Schulz polynomial, as Jordan et al. tuned them: singular values reach 0.7 to 1.2 in few iterations.
COEFFICIENTS = (3.4445, -4.775, 2.0315)
ITERATIONS = 5
MAX_NUMBERS = 2**24  # in the matrices of one call, unless one has more; a call needs four times their memory
SMALLEST_NORM = 1e-7  # a matrix of zeros stays zero instead of becoming NaN


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum, for weights of two axes or more.

    torch.optim.Muon rejects the weights of convolutions. It also orthogonalizes one matrix after another in bfloat16,
    which takes longer than the rest of a step on processors without bfloat16 instructions. This class orthogonalizes
    all matrices of one shape as one batch, in float32. The root mean square of an update is `scale` times the learning
    rate. With 1 it is that of Adam's first update; Liu et al. take 0.2.
    """

    def __init__(
        self,
        weights: Iterable[nn.Parameter],
        lr: float,
        *,
        weight_decay: float = 0.0,
        scale: float = 1.0,
        momentum: float = 0.95,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "scale": scale, "momentum": momentum}
        super().__init__(weights, defaults)

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
                # The root mean square of an orthogonal matrix is max(rows, columns)**-0.5.
                size = group["scale"] * group["lr"] * max(rows, columns) ** 0.5
                at_once = max(1, MAX_NUMBERS // (rows * columns))
                for start in range(0, len(pairs), at_once):
                    stacked = pairs[start : start + at_once]
                    updates = orthogonalize(torch.stack([update for _, update in stacked]))
                    for (weight, _), update in zip(stacked, updates, strict=True):
                        weight.mul_(1 - group["lr"] * group["weight_decay"])
                        weight.add_(update.view(weight.shape), alpha=-size)

    def _momentum(self, weight: Tensor, momentum: float) -> Tensor:
        """Update the moving average; return Nesterov's look-ahead, the average after one more such gradient."""
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
    x = x.mT.contiguous() if is_tall else x  # so that the Gram matrix below has the shorter side
    # The iterations converge for singular values up to 1, which the Frobenius norm bounds.
    x = x / x.flatten(1).norm(dim=1).clamp(min=SMALLEST_NORM)[:, None, None]
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).contiguous().to(matrices.dtype)
