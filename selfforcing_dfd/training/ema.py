"""The moving average of the student's parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from selfforcing_dfd.training.compare import copy_same


class EMA:
    """Float32 shadow of the parameters: shadow + (1 - decay) (parameter - shadow) at each update.

    Updates are those of the student. Before student update number `start` the shadow is a copy.
    Shadows live where the parameters do and are sharded as they are: a distributed checkpoint would
    keep only one rank's plain tensors.
    """

    def __init__(self, model: nn.Module, decay: float, start: int = 0) -> None:
        if not 0 <= decay < 1 or start < 0:
            raise ValueError(
                f"EMA decay is {decay}, start {start}; needed: 0 <= decay < 1 and start >= 0"
            )
        self.decay = decay
        self.start = start
        self.student_updates = 0
        self.shadow = {
            name: parameter.detach().to(torch.float32, copy=True)
            for name, parameter in model.named_parameters()
        }

    @torch.no_grad()
    def update(self, model: nn.Module, student_updates: int) -> None:
        """Follow the parameters after student update number `student_updates`, counted from 1.

        ValueError for a number that does not advance: on turns of the fake score the student has
        not moved, and averaging it again would raise the decay to a power.
        """
        if student_updates <= self.student_updates:
            raise ValueError(
                f"EMA has seen student update {self.student_updates} and got {student_updates}; "
                "call it once after each student update, not on fake-score turns"
            )
        for name, parameter in self._parameters(model).items():
            if student_updates < self.start:
                self.shadow[name].copy_(parameter)
            else:
                self.shadow[name].lerp_(parameter.float(), 1 - self.decay)
        self.student_updates = student_updates

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the model's parameters with the average, in the parameters' own dtype."""
        for name, parameter in self._parameters(model).items():
            parameter.copy_(self.shadow[name])

    @contextmanager
    def swap(self, model: nn.Module) -> Iterator[None]:
        """Inside the `with` the model has the averaged parameters, afterwards its own bits again.

        That holds after an error in the body, too.
        """
        own = {name: parameter.clone() for name, parameter in self._parameters(model).items()}
        try:
            self.copy_to(model)
            yield
        finally:
            for name, parameter in self._parameters(model).items():
                parameter.copy_(own[name])

    def state_dict(self) -> dict[str, Any]:
        """The shadows themselves, not copies. Decay and start belong to the config."""
        return {"student_updates": self.student_updates, "shadow": self.shadow}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over another average's state.

        ValueError, before anything is changed, unless names, shapes and dtypes are those of this
        model.
        """
        if set(state) != {"student_updates", "shadow"}:
            raise ValueError(f"EMA state has {sorted(state)}; it needs student_updates and shadow")
        copy_same("EMA", state["shadow"], self.shadow)
        self.student_updates = int(state["student_updates"])

    def _parameters(self, model: nn.Module) -> dict[str, Tensor]:
        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        differing = sorted(parameters.keys() ^ self.shadow.keys())
        if differing:
            raise ValueError(
                f"EMA follows another model: {len(differing)} parameters are not on both sides, "
                f"first {differing[:3]}"
            )
        return parameters
