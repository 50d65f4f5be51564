"""Where the tests of this folder run: on a CUDA device, or, to rehearse them, on the CPU.

With SELFFORCING_DFD_REHEARSAL=1 every test that needs no kernel of a GPU runs on the CPU, at small
sizes and without inductor. That finds what is mistyped. It says nothing about a GPU.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.gpu.unit import REHEARSAL
from selfforcing_dfd.models.fp8 import Fp8Error, check_device, check_package

ON_GPU = os.environ.get(REHEARSAL) != "1"
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
COMPILER: dict[str, Any] = {} if ON_GPU else {"backend": "eager"}


@contextmanager
def errors_where_the_host_waits() -> Iterator[None]:
    """Within it, whatever waits for the device raises an error; on a CPU nothing does."""
    if not ON_GPU:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def has_fp8() -> bool:
    """Whether 8-bit linear layers run here: the device, torchao and torch can."""
    if ON_GPU and not torch.cuda.is_available():
        return False
    try:
        check_package()
        check_device(DEVICE, torch.bfloat16)
    except Fp8Error:
        return False
    return True


def allocated() -> int:
    """Bytes of tensors on the device; 0 on a CPU, where torch does not count them."""
    gc.collect()  # what an earlier test leaves in cycles
    return torch.cuda.memory_allocated() if ON_GPU else 0


def peak_of(call: Callable[[], object]) -> int:
    """The most bytes of tensors on the device while a call runs; 0 on a CPU."""
    if not ON_GPU:
        call()
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()
