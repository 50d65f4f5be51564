"""Stage `kernels`: every attention kernel at the shapes that Wan has in a stream and in training.

Keys and values are views of a ring, as they are in a stream.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.record import Machine, Missing, Record
from benchmarks.gpu.timing import milliseconds, rate
from selfforcing_dfd.context import Attention
from selfforcing_dfd.models.attention import (
    KERNELS,
    SDPA,
    attend,
    installed_kernels,
    load_kernel,
    obstacle,
)

FRAMES = ((3, 3), (3, 9), (3, 12), (3, 24), (21, 21))
"""Latent frames of queries and of keys: chunks of a stream, and a whole clip."""
TEXT = 512
BACKWARD = ((3, 12), (21, 21))


def measure(record: Record) -> None:
    machine = record.machine
    frame, heads, head_dim = (24, 2, 64) if machine.small else (1560, 12, 128)
    ring = random((2, 1, 24 * frame, heads, head_dim), machine)
    for name in (*SDPA, *KERNELS):
        for frames, keys in (*FRAMES, (3, 0)):
            num_keys = keys * frame or TEXT
            shape = (frames * frame, num_keys, heads, head_dim)
            label = f"{name}, {frames} frames over {f'{keys} frames' if keys else 'text'}"
            gradient_too = (frames, keys) in BACKWARD
            record.row(label, partial(timed, machine, name, ring, shape, gradient_too))


def usable(machine: Machine, name: str, head_dim: int) -> Attention:
    """The kernel's function. Raises Missing where it cannot run."""
    if name in KERNELS:
        capability = torch.cuda.get_device_capability() if machine.on_gpu else None
        installed = installed_kernels() if machine.on_gpu else set()
        why = obstacle(name, capability, torch.bfloat16, head_dim, installed)
        if why:
            raise Missing(why)
    return load_kernel(name, machine.device)


def timed(
    machine: Machine, name: str, ring: Tensor, shape: tuple[int, int, int, int], gradient_too: bool
) -> dict[str, Any]:
    """Time and rate forward and with gradient, and the error against float32 where that fits."""
    kernel = usable(machine, name, shape[3])
    num_queries, num_keys, heads, head_dim = shape
    q = random((1, num_queries, heads, head_dim), machine)
    k = ring[0][:, :num_keys]
    v = ring[1][:, :num_keys]
    flops = 4 * num_queries * num_keys * heads * head_dim
    with torch.no_grad():
        found: dict[str, Any] = rate(flops, milliseconds(lambda: kernel(q, k, v), machine.device))
        if num_queries * num_keys < 10**8:
            exact = attend(q.float(), k.float(), v.float())
            found["error"] = float((kernel(q, k, v).float() - exact).norm() / exact.norm())
    if gradient_too and not (name in KERNELS and KERNELS[name].eight_bits):
        backward = with_backward(kernel, q, k, v)
        ms = milliseconds(backward, machine.device, repeats=8, warm=2)
        found["with gradient"] = rate(3.5 * flops, ms)
    return found


def with_backward(kernel: Attention, *inputs: Tensor) -> Callable[[], object]:
    """A call with its backward pass, which makes two and a half times the operations."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    gradient = torch.randn_like(leaves[0])
    return lambda: torch.autograd.grad(kernel(*leaves), leaves, gradient)


def random(shape: tuple[int, ...], machine: Machine) -> Tensor:
    return torch.randn(shape, device=machine.device, dtype=torch.bfloat16)
