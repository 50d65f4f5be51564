"""What training keeps by parameter name: the moving average, the optimizer's state, and weights for
others to read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from selfforcing_dfd.common import sync

NUM_SHOWN = 5


class EMA:
    """Float32 shadow of the parameters: shadow + (1 - decay) (parameter - shadow) after each
    student update.

    Before student update number `start` the shadow is a copy. Shadows live where the parameters do
    and are sharded as they are (plain local shards would be lost in a distributed checkpoint, which
    keeps one rank's plain tensors).
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
        """The model with averaged parameters inside the `with`; afterwards its own bits again,
        errors or not.
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
        """ValueError, before anything is changed, unless names, shapes and dtypes are those of this
        model.
        """
        if set(state) != {"student_updates", "shadow"}:
            raise ValueError(f"EMA state has {sorted(state)}; it needs student_updates and shadow")
        _copy_same("EMA", state["shadow"], self.shadow)
        self.student_updates = int(state["student_updates"])

    def _parameters(self, model: nn.Module) -> dict[str, Tensor]:
        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        differing = sorted(parameters.keys() ^ self.shadow.keys())
        if differing:
            raise ValueError(
                f"EMA follows another model: {len(differing)} parameters are not on both sides, first {differing[:3]}"
            )
        return parameters


def optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, Tensor]]:
    """The optimizer's own tensors, no copies, by parameter name: {step, exp_avg, exp_avg_sq} or
    Muon's momentum_buffer.

    Before the first step they are made here, as the optimizer makes them: training is unchanged and
    a checkpoint always has a place to go. (`torch.distributed.checkpoint.state_dict` takes a step
    for that, and leaves step = 1.) Learning rate and other hyperparameters are not in it: they
    follow from the config and the clock.
    """
    if not isinstance(optimizer, torch.optim.AdamW | torch.optim.Muon):
        raise ValueError(
            f"the optimizer is {type(optimizer).__name__}; only the state of AdamW and Muon can be kept"
        )
    if any(group.get("amsgrad") for group in optimizer.param_groups):
        raise ValueError(
            "AdamW runs with amsgrad, whose state cannot be kept; set amsgrad to False"
        )
    names = {parameter: name for name, parameter in model.named_parameters()}
    state = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in names:
                raise ValueError(
                    f"the optimizer has a parameter {list(parameter.shape)} that the model has not"
                )
            if not optimizer.state[parameter]:
                optimizer.state[parameter] = _fresh_state(parameter, group)
            state[names[parameter]] = dict(optimizer.state[parameter])
    return state


def load_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Copy into `optimizer` what `optimizer_state` gave; ValueError, before any change, if it is
    another model's.
    """
    own = optimizer_state(model, optimizer)
    _copy_same("optimizer", _by_dotted_name(state), _by_dotted_name(own))


def save_weights(
    path: Path | str,
    weights: nn.Module | Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write one safetensors file; a kill leaves the old file or the new one, a failure the old one.

    dtype: for floating-point tensors; None keeps their own. With a process group all ranks call,
    the first one writes.
    """
    path = Path(path)
    tensors = {name: whole(tensor) for name, tensor in _named(weights).items()}
    tensors = {
        name: t.to(dtype) if dtype and t.is_floating_point() else t for name, t in tensors.items()
    }
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        save_file(tensors, temporary, dict(metadata or {}))
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def load_weights(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors by name on the CPU, metadata) of a safetensors file; ValueError if it is missing or
    truncated.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} is no file; wanted: one .safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(
                file.metadata() or {}
            )
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated or no safetensors file ({error}); export it again"
        ) from error


def model_fingerprint(weights: nn.Module | Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bits: the identity of a model that a checkpoint does
    not hold.
    """
    digest = hashlib.sha256()
    for name, tensor in _named(weights).items():
        digest.update(f"{name} {describe(tensor)}".encode())
        digest.update(whole(tensor).reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], source: str = "checkpoint"
) -> list[str]:
    """One line for each key whose value is not the same on both sides."""
    keys = [*before, *(key for key in now if key not in before)]
    return [
        f"{key}: {source} {before.get(key, 'absent')}, now {now.get(key, 'absent')}"
        for key in keys
        if key not in before or key not in now or before[key] != now[key]
    ]


def describe(tensor: Tensor) -> str:
    """Shape and dtype in words."""
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def whole(tensor: Tensor) -> Tensor:
    """Contiguous on the CPU, with all shards of a DTensor."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().contiguous()


def _named(weights: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return weights.state_dict() if isinstance(weights, nn.Module) else weights


def _fresh_state(parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
    """What Muon or AdamW creates at its first step (torch/optim/_muon.py, adam.py: `_init_group`)."""
    if "momentum" in group:
        return {"momentum_buffer": torch.zeros_like(parameter, requires_grad=False)}
    device = parameter.device if group["fused"] or group["capturable"] else torch.device("cpu")
    moments = {
        name: torch.zeros_like(parameter, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")
    }
    return {"step": torch.zeros((), dtype=torch.float32, device=device), **moments}


def _by_dotted_name(state: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": tensor
        for name, tensors in state.items()
        for key, tensor in tensors.items()
    }


@torch.no_grad()
def _copy_same(what: str, given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    got, wanted = (
        {name: describe(tensor) for name, tensor in side.items()} for side in (given, own)
    )
    lines = differences(got, wanted, source="state")
    if lines:
        shown = "\n  ".join(lines[:NUM_SHOWN])
        raise ValueError(
            f"the {what} state was made by another model: {len(lines)} entries differ\n  {shown}"
        )
    for name, tensor in own.items():
        tensor.copy_(given[name])
