"""Weights in 8 bits a value, for small files: half of float16, read back as float16.

Each row of a matrix is stored as 8-bit numbers from -127 to 127 and one scale, in a tensor of its
own that is named `NAME.row_scale`. A value is off by half a scale at most: 1/254 of its row's
largest. Only storage is rounded; networks never compute with these numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from selfforcing_dfd.weights.stored import StoredTensor

ROW_SCALE = ".row_scale"
LARGEST = 127


def in_8_bits(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices of floats as 8-bit rows and their float32 scales; other floats as float16."""
    packed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        packed[name] = tensor.half() if tensor.is_floating_point() else tensor
        if tensor.ndim == 2 and tensor.is_floating_point():
            rows = tensor.float()
            scale = rows.abs().amax(dim=1) / LARGEST
            divisor = torch.where(scale > 0, scale, 1.0)
            packed[name] = (rows / divisor[:, None]).round().to(torch.int8)
            packed[name + ROW_SCALE] = scale
    return packed


def from_8_bits(raw: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Stored tensors with those of `in_8_bits` as float16; all others as they are."""
    packed = {
        name
        for name, tensor in raw.items()
        if tensor.dtype == torch.int8 and name + ROW_SCALE in raw
    }
    scales = {name + ROW_SCALE for name in packed}
    found = {name: tensor for name, tensor in raw.items() if name not in scales}
    for name in packed:
        read = partial(_read, raw[name], raw[name + ROW_SCALE])
        found[name] = dataclasses.replace(raw[name], dtype=torch.float16, read=read)
    return found


def _read(tensor: StoredTensor, scale: StoredTensor) -> Tensor:
    return (tensor.read().float() * scale.read().float()[:, None]).half()
