"""State of a training run: weights, their moving average (EMA) and the optimizers as one flat dict of tensors.

network.NAME            weights and buffers
ema.n_averaged          updates of the moving average so far
ema.module.NAME         averaged weights and buffers; absent without an EMA
optimizer.INDEX.NAME    state that an optimizer has of the network's parameter with this index
metrics_since_log       (ranks, numbers) sums of the metrics of the steps after the last logged one
microbatch              the automatic size of micro-batches; absent with a fixed one

To add a tensor of the model, extend `tensors`, `restore` and `mismatch` of `TrainableModel`. To add another value, add
a field to `TrainState`; loop.py fills it and joins the groups above, and checkpoint.py writes and reads them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from stages.config import TrainConfig
from stages.errors import UserError
from stages.training.optimizer import build_optimizers, state_shapes

METRICS_SINCE_LOG = "metrics_since_log"
MICROBATCH = "microbatch"


@dataclass(frozen=True)
class TrainState:
    """Complete state of a training run after `step` steps."""

    step: int
    tensors: Mapping[str, Tensor]
    history: list[dict[str, Any]]  # rows of step, name, value: the curves so far


class TrainableModel:
    """A network with its optimizers and, if configured, an EMA copy of its weights."""

    def __init__(self, network: nn.Module, config: TrainConfig) -> None:
        self.network = network
        self.optimizers = build_optimizers(network, config)
        self._index: dict[Tensor, int] = {weight: index for index, weight in enumerate(network.parameters())}
        self.ema_model: AveragedModel | None = None
        if config.ema_decay:
            self.ema_model = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
            self.ema_model.module.requires_grad_(False)

    @property
    def evaluation_network(self) -> nn.Module:
        """The network to evaluate: the EMA copy if there is one."""
        return self.network if self.ema_model is None else self.ema_model.module

    def apply_gradients(self, learning_rate: float, max_grad_norm: float) -> None:
        """Clip the gradients, take one optimizer step and reset the gradients."""
        if max_grad_norm:
            nn.utils.clip_grad_norm_(self.network.parameters(), max_grad_norm)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def update_ema(self) -> None:
        """Move the EMA copy towards the current weights."""
        if self.ema_model is not None:
            self.ema_model.update_parameters(self.network)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything to save, by the names above. The tensors are not copied."""
        tensors = self._weights()
        for optimizer in self.optimizers:
            for weight, state in optimizer.state.items():
                tensors |= {f"optimizer.{self._index[weight]}.{name}": tensor for name, tensor in state.items()}
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Load what `tensors` returned."""
        self.network.load_state_dict(select_prefix(tensors, "network."))
        if self.ema_model is not None:
            self.ema_model.load_state_dict(select_prefix(tensors, "ema."))
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in select_prefix(tensors, "optimizer.").items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = tensor
        for optimizer in self.optimizers:
            indices = [self._index[weight] for group in optimizer.param_groups for weight in group["params"]]
            # An optimizer's own state dict counts its parameters from 0.
            own_state = {number: state[index] for number, index in enumerate(indices) if index in state}
            optimizer.load_state_dict({**optimizer.state_dict(), "state": own_state})
            for weight, restored in optimizer.state.items():  # in the weight's memory format, as the first step made it
                for name, tensor in restored.items():
                    if tensor.shape == weight.shape:
                        restored[name] = torch.empty_like(weight).copy_(tensor)

    def mismatch(self, saved: Mapping[str, Tensor], num_metrics: int) -> str:
        """Describe how saved tensors differ from what this model needs; "" if names and shapes match.

        A checkpoint with intact files may still lack tensors, and an optimizer would silently restart its moments.
        """
        saved_shapes = {name: tensor.shape for name, tensor in saved.items() if name != MICROBATCH}
        shapes = {name: tensor.shape for name, tensor in self._weights().items()}
        for optimizer in self.optimizers:
            for weight in (weight for group in optimizer.param_groups for weight in group["params"]):
                if weight.requires_grad:
                    prefix = f"optimizer.{self._index[weight]}."
                    shapes |= {prefix + name: shape for name, shape in state_shapes(optimizer, weight).items()}
        # One row per rank of the run that saved it, which may have had another number of ranks.
        shapes[METRICS_SINCE_LOG] = torch.Size([*saved_shapes.get(METRICS_SINCE_LOG, [])[:1], num_metrics])
        names = sorted(
            name for name in shapes.keys() | saved_shapes.keys() if shapes.get(name) != saved_shapes.get(name)
        )
        if not names:
            return ""
        others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        return f"{names[0]}{others} is missing, unexpected or of another shape"

    def require_gradients(self) -> None:
        """Raise UserError if a trainable parameter has no gradient. Call before the first optimizer step.

        Otherwise no checkpoint would be complete, since an optimizer has no moments of such a parameter.
        """
        for name, weight in self.network.named_parameters():
            if weight.requires_grad and weight.grad is None:
                raise UserError(
                    f"The loss does not depend on {name}, so it has no gradient.",
                    where=type(self.network).__name__,
                    fix="Use it in forward, remove it, or set its requires_grad to False.",
                )

    def _weights(self) -> dict[str, Tensor]:
        tensors = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        if self.ema_model is not None:
            tensors |= {f"ema.{name}": tensor for name, tensor in self.ema_model.state_dict().items()}
        return tensors


def trained_weights(tensors: Mapping[str, Tensor], config: TrainConfig) -> dict[str, Tensor]:
    """Select the weights of the finished network from a checkpoint: the averaged ones if there is an EMA."""
    return select_prefix(tensors, "ema.module." if config.ema_decay else "network.")


def select_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Select the tensors whose names start with a prefix, and strip it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
