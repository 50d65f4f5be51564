"""Stage `probe`: what the machine is, and the rates that nothing on it can exceed."""

from __future__ import annotations

import sys
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch.nn.functional import linear

from benchmarks.gpu.record import Machine, Missing, Record
from benchmarks.gpu.timing import milliseconds, rate
from selfforcing_dfd.benchmark.table import output_of
from selfforcing_dfd.models.attention import fitting_kernels, installed_kernels

PACKAGES = (
    *("torch", "triton", "diffusers", "transformers", "accelerate", "torchao", "kernels"),
    *("flash-attn", "flash-attn-4", "nvidia-cutlass-dsl", "omegaconf", "webdataset", "av"),
)
DIM = 1536  # of Wan2.1 1.3B
FFN = 8960
FRAME = 1560  # tokens of a latent frame at 480x832
GIGABYTES = 4
NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,memory.total,clocks.max.sm,power.limit")


def measure(record: Record) -> None:
    machine = record.machine
    record.row("machine", lambda: describe(machine))
    record.row("copy", lambda: copy_rate(machine))
    for rows in (3 * FRAME, 21 * FRAME):
        for wide, out in ((DIM, DIM), (DIM, 3 * DIM), (DIM, FFN), (FFN, DIM)):
            sizes = (rows, wide, out)
            if machine.small:
                sizes = (64, 64, 64)
            record.row(f"bf16 {rows}x{wide}x{out}", partial(bf16_rate, machine, sizes))
            for fast in (False, True):
                name = f"fp8 {rows}x{wide}x{out}, fast accumulation {'on' if fast else 'off'}"
                record.row(name, partial(fp8_rate, machine, sizes, fast))


def describe(machine: Machine) -> dict[str, Any]:
    """Versions, memory, and the attention kernels that this machine could run."""
    capability = torch.cuda.get_device_capability() if machine.on_gpu else None
    found: dict[str, Any] = {"python": sys.version.split()[0]}
    found["packages"] = {name: version_of(name) for name in PACKAGES}
    installed = installed_kernels() if machine.on_gpu else set()
    found["attention kernels"] = fitting_kernels(capability, torch.bfloat16, 128, installed)
    found["nvidia-smi"] = output_of([*NVIDIA_SMI, "--format=csv,noheader"])
    if machine.on_gpu:
        found["capability"] = ".".join(map(str, capability or ()))
        found["free GB"], found["GB"] = (size / 1e9 for size in torch.cuda.mem_get_info())
    return found


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def copy_rate(machine: Machine) -> dict[str, float]:
    """Terabytes a second of a copy on the device, those read and those written."""
    num_bytes = 2**22 if machine.small else GIGABYTES * 2**30
    source = torch.empty(num_bytes, dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    ms = milliseconds(lambda: target.copy_(source), machine.device)
    return {"ms": ms, "TB_per_s": 2 * num_bytes / ms / 1e9}


def bf16_rate(machine: Machine, sizes: tuple[int, int, int]) -> dict[str, float]:
    rows, wide, out = sizes
    x = torch.randn(rows, wide, device=machine.device, dtype=torch.bfloat16)
    weight = torch.randn(out, wide, device=machine.device, dtype=torch.bfloat16)
    flops = 2 * rows * wide * out
    return rate(flops, milliseconds(lambda: linear(x, weight), machine.device))


def fp8_rate(machine: Machine, sizes: tuple[int, int, int], fast: bool) -> dict[str, float]:
    """A product of e4m3 values with a scale for each row and column, its bias included."""
    if not machine.on_gpu:
        raise Missing("8-bit products by rows are timed on a GPU only")
    rows, wide, out = sizes
    device = machine.device
    x = torch.randn(rows, wide, device=device).to(torch.float8_e4m3fn)
    weight = torch.randn(out, wide, device=device).to(torch.float8_e4m3fn)
    scales = (torch.ones(rows, 1, device=device), torch.ones(1, out, device=device))
    bias = torch.zeros(out, device=device, dtype=torch.bfloat16)

    def product() -> object:
        return torch._scaled_mm(
            x, weight.t(), *scales, bias, out_dtype=torch.bfloat16, use_fast_accum=fast
        )

    return rate(2 * rows * wide * out, milliseconds(product, device))
