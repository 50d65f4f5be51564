"""Which attention kernel a network uses: the one that was named, or the fastest of those that fit.

Training takes the first that fits, in a fixed order: a choice by the clock may differ between
processes, and after a resume, and another kernel rounds otherwise.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from selfforcing_dfd import rng
from selfforcing_dfd.context import Attention
from selfforcing_dfd.models.attention import (
    KERNELS,
    SDPA,
    AttentionError,
    attend,
    check_name,
    fitting_kernels,
    installed_kernels,
    load_kernel,
)
from selfforcing_dfd.models.attention_operator import KernelAttention

log = logging.getLogger(__name__)

CLEARLY_FASTER = 0.95
"""Share of a kernel's time that one with a lower preference may take at most to replace it."""
REPEATS = 15
LARGEST_ERROR = 0.02  # relative; the roundings of 16 bits cost .003


@dataclass(frozen=True, slots=True)
class Trial:
    """A typical call, on which kernels are measured: sizes of [1, tokens, heads, head_dim]."""

    queries: int
    keys: int
    heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class Choice:
    """The attention of a network. timings_ms: of each kernel that was measured, if several were."""

    attention: KernelAttention = field(default_factory=KernelAttention)
    timings_ms: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.attention.name

    def __str__(self) -> str:
        """`fa3`, or `fa3 (measured: fa3 1.21 ms, sdpa 1.46 ms)`."""
        timings = ", ".join(f"{name} {ms:.2f} ms" for name, ms in self.timings_ms.items())
        return f"{self.name} (measured: {timings})" if timings else self.name


def choose_attention(
    weight: Tensor, head_dim: int, name: str = "auto", trial: Trial | None = None
) -> Choice:
    """The kernel for a network with such weights, where they now are.

    name: auto, or a kernel's. trial: what `auto` measures with; None: it takes the first that fits.
    Raises AttentionError for a kernel that was named and cannot run here; `auto` goes on without
    one that cannot be loaded.
    """
    capability = torch.cuda.get_device_capability(weight.device) if weight.is_cuda else None
    # only where it matters: importing a FlashAttention can take ten seconds
    installed = installed_kernels() if capability and name not in SDPA else set()
    check_name(name, capability, weight.dtype, head_dim, installed)
    if name != "auto":
        if name in KERNELS and KERNELS[name].eight_bits and weight.requires_grad:
            raise AttentionError(f"attention {name} has no backward pass; train with another")
        return taken(Choice(KernelAttention(name, load_kernel(name, weight.device))))
    names = fitting_kernels(capability, weight.dtype, head_dim, installed)
    if trial is not None and len(names) > 1:
        timings = measured(tuple(names), trial, weight.device, weight.dtype)
        fast = fastest(timings)
        return taken(Choice(KernelAttention(fast, load_kernel(fast, weight.device)), timings))
    return taken(first_that_loads(names, weight.device))


def taken(choice: Choice) -> Choice:
    log.info("attention by %s", choice)
    return choice


def first_that_loads(names: list[str], device: torch.device) -> Choice:
    for name in names[:-1]:
        try:
            return Choice(KernelAttention(name, load_kernel(name, device)))
        except AttentionError as error:
            log.warning("%s", error)
    return Choice(KernelAttention(names[-1], load_kernel(names[-1], device)))


def fastest(timings_ms: Mapping[str, float]) -> str:
    """The first kernel than which none is clearly faster; so close ones do not take turns."""
    least = min(timings_ms.values())
    return next(name for name, ms in timings_ms.items() if CLEARLY_FASTER * ms <= least)


@cache
def measured(
    names: tuple[str, ...], trial: Trial, device: torch.device, dtype: torch.dtype
) -> Mapping[str, float]:
    """Milliseconds of a call, by kernel; without those that fail, or whose answer is wrong.

    Measured once in a process for each device and size.
    """
    q, k, v = (
        rng.normal((1, tokens, trial.heads, trial.head_dim), 0, part).to(device, dtype)
        for part, tokens in (("q", trial.queries), ("k", trial.keys), ("v", trial.keys))
    )
    functions = {}
    with torch.inference_mode():
        exact = attend(q, k, v)
        for name in names:
            try:
                function = load_kernel(name, device)
                check_answer(name, function(q, k, v), exact)
                functions[name] = function
            except Exception as error:  # of the kernel: it does not build, load or run here
                log.warning("attention %s is left out: %s", name, error)
        timings = milliseconds(functions, q, k, v)
    if not timings:
        raise AttentionError(f"no attention kernel runs on {device}; the warnings above say why")
    return timings


def check_answer(name: str, attended: Tensor, exact: Tensor) -> None:
    """Raise AttentionError for a kernel whose answer is not SDPA's."""
    error = float((attended.float() - exact.float()).norm() / exact.float().norm())
    if not error < LARGEST_ERROR:
        raise AttentionError(f"attention {name} is off by {error:.2g} of SDPA's answer; use sdpa")


def milliseconds(
    functions: Mapping[str, Attention], q: Tensor, k: Tensor, v: Tensor
) -> Mapping[str, float]:
    """Of each kernel the shortest of some calls; the device is idle before each and after it.

    The kernels take turns: an idle GPU needs some milliseconds to reach its pace, which would all
    be charged to the first one.
    """
    times = dict.fromkeys(functions, math.inf)
    for _ in range(REPEATS):
        for name, function in functions.items():
            wait_for(q.device)
            started = time.perf_counter()
            function(q, k, v)
            wait_for(q.device)
            times[name] = min(times[name], 1000 * (time.perf_counter() - started))
    return times


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
