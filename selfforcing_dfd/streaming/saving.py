"""How a stream saves memory: a student in 8 bits, blocks on the host, a text encoder elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from selfforcing_dfd.models.fp8 import use_fp8
from selfforcing_dfd.models.network import WanNetwork
from selfforcing_dfd.streaming.parts import LoadError

TextPlace = Literal["keep", "cpu", "free"]
"""Where the text encoder is. keep: on the student's device, once a new prompt has asked for it.
cpu: on the CPU, where a prompt takes seconds. free: on the student's device while it encodes; each
new prompt reads its weights again.
"""


@dataclass(frozen=True, slots=True)
class Saving:
    """What is saved.

    fp8: linear layers in 8 bits. group_size: blocks of a group, of which two are on the device at a
    time; 0: all blocks are. text: where the text encoder is. lean_vae: the decoder's convolutions
    share their memory. Raises LoadError for another place of the text encoder.
    """

    fp8: bool = False
    group_size: int = 0
    text: TextPlace = "keep"
    lean_vae: bool = False

    def __post_init__(self) -> None:
        if self.text not in get_args(TextPlace):
            raise LoadError(f"text is {self.text!r}; use {', '.join(get_args(TextPlace))}")

    def first_device(self, device: torch.device) -> torch.device:
        """Where to load a student that is to run on `device`, which may not hold it as it is."""
        return torch.device("cpu") if self.fp8 or self.group_size else device

    def place(self, student: WanNetwork, device: torch.device) -> None:
        """Convert a frozen student and bring it to the device, or what of it is there at first."""
        if self.fp8:
            use_fp8(student, device)
        if self.group_size:
            student.offload_blocks(device, self.group_size)
        else:
            torch.nn.Module.to(student, device)


NOTHING_SAVED = Saving()
