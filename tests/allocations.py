"""How many bytes of tensors a computation holds at its peak, counted exactly: every storage that an op allocates, from
the op to the storage's end."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")


class _Allocations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.held = 0
        self.peak = 0
        self._live: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata in known or storage._cdata in self._live:
                continue
            self._live[storage._cdata] = weakref.ref(storage)
            size = storage.nbytes()
            self.held += size
            weakref.finalize(storage, self._free, storage._cdata, size)
        self.peak = max(self.peak, self.held)
        return out

    def _free(self, key: int, size: int) -> None:
        self.held -= size
        self._live.pop(key, None)


def peak_bytes(run: Callable[[], T]) -> tuple[T, int]:
    """What `run` returns, and the most bytes that it held at once of what it allocated."""
    with _Allocations() as allocations:
        result = run()
    return result, allocations.peak
