"""An optimizer's state by parameter name, for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, Tensor]]:
    """The optimizer's own tensors, no copies, by parameter name.

    AdamW has {step, exp_avg, exp_avg_sq}, Muon {momentum_buffer}. Before the first step they are
    made here, as the optimizer makes them: training is unchanged, and a checkpoint can always be
    loaded into them. (`torch.distributed.checkpoint.state_dict` takes a step for that, and leaves
    step = 1.) Learning rate and other hyperparameters follow from config and clock, so they are not
    in it. ValueError for another optimizer, and for parameters that the model has not.
    """
    if not isinstance(optimizer, torch.optim.AdamW | torch.optim.Muon):
        raise ValueError(
            f"the optimizer is {type(optimizer).__name__}; "
            "only the state of AdamW and Muon can be kept"
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


def _fresh_state(parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
    """What Muon or AdamW creates at its first step (`_init_group` in torch/optim)."""
    if "momentum" in group:
        return {"momentum_buffer": torch.zeros_like(parameter, requires_grad=False)}
    on_device = group["fused"] or group["capturable"]
    device = parameter.device if on_device else torch.device("cpu")
    return {
        "step": torch.zeros((), dtype=torch.float32, device=device),
        "exp_avg": torch.zeros_like(parameter, requires_grad=False),
        "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
    }
