"""Peak memory of a training step, counted with fake tensors. They allocate no data, so a network may be of any size.

    with count_memory() as counter:
        network = ...                # its parameters are fake tensors too
        loss = network(...)
        loss.backward()
    counter.peak_bytes

Not counted: fragmentation of the allocator, workspaces of kernels, and the CUDA context.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryCounter(TorchDispatchMode):
    """Dispatch mode that counts the bytes of the live storages that operations have created."""

    def __init__(self) -> None:
        super().__init__()
        self.current_bytes = self.peak_bytes = 0
        self._sizes: dict[weakref.ref[torch.UntypedStorage], int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        # References to one live storage are equal, so a view adds nothing. `_remove` runs when the storage is freed.
        reference = weakref.ref(storage, self._remove)
        if reference not in self._sizes:
            self._sizes[reference] = storage.nbytes()
            self.current_bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self.current_bytes)

    def _remove(self, reference: "weakref.ref[torch.UntypedStorage]") -> None:
        self.current_bytes -= self._sizes.pop(reference)


@contextmanager
def count_memory() -> Iterator[MemoryCounter]:
    """Create fake tensors in the block, and count their memory."""
    with FakeTensorMode(), MemoryCounter() as counter:
        yield counter
