"""Differences between what is stored and what is wanted, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

NUM_SHOWN = 5


def describe(tensor: Tensor) -> str:
    """Shape and dtype in words: `[4, 3] float32`."""
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], source: str = "checkpoint"
) -> list[str]:
    """One line for each key whose value is not the same on both sides."""
    lines = []
    for key in dict.fromkeys([*before, *now]):
        on_both_sides = key in before and key in now
        if not on_both_sides or before[key] != now[key]:
            was = before.get(key, "absent")
            lines.append(f"{key}: {source} {was}, now {now.get(key, 'absent')}")
    return lines


def listed(lines: Sequence[str], num_shown: int = NUM_SHOWN) -> str:
    """The first lines below each other, each after a line break, and how many more there are."""
    shown = list(lines[:num_shown])
    if len(lines) > num_shown:
        shown.append(f"and {len(lines) - num_shown} more")
    return "".join(f"\n  {line}" for line in shown)


@torch.no_grad()
def copy_same(what: str, given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Copy `given` into `own`, name by name.

    ValueError, before anything is changed, unless names, shapes and dtypes are the same.
    """
    got = {name: describe(tensor) for name, tensor in given.items()}
    wanted = {name: describe(tensor) for name, tensor in own.items()}
    lines = differences(got, wanted, source="state")
    if lines:
        raise ValueError(
            f"the {what} state was made by another model: {len(lines)} entries differ"
            f"{listed(lines)}"
        )
    for name, tensor in own.items():
        tensor.copy_(given[name])
