"""How much memory a call needs at once, found on the meta device, where tensors have no memory.

Bytes of a tensor count from the operator that makes it until nobody holds it. What a kernel takes
inside is not seen. Norms and attention run as one kernel on CUDA and are taken apart on the meta
device; here they count as one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LIKE_THE_FIRST = (rms_norm, torch.rms_norm, scaled_dot_product_attention)
"""Functions of one kernel whose result has the shape of what comes first."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are made while it is active. peak: the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self.known: dict[int, weakref.finalize[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(t.untyped_storage()) for t in tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in tensors(result):
            storage = tensor.untyped_storage()
            if id(storage) not in given and id(storage) not in self.known:
                self.begin(storage)
        return result

    def begin(self, storage: Any) -> None:
        key = id(storage)
        self.known[key] = weakref.finalize(storage, self.end, key, storage.nbytes())
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)

    def end(self, key: int, num_bytes: int) -> None:
        del self.known[key]
        self.now -= num_bytes


class OneKernel(TorchFunctionMode):
    """Runs the functions of LIKE_THE_FIRST as if they were one kernel."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in LIKE_THE_FIRST:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


def tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most bytes that a call on the meta device holds at once, beside what it is given.

    What the call returns is among them.
    """
    counter = LiveBytes()
    with torch.no_grad(), counter, OneKernel():
        held = call()
    del held
    return counter.peak
