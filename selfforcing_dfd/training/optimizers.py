"""Optimizers and learning rates from settings."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim import Optimizer

from selfforcing_dfd.config import OptimizerConfig
from selfforcing_dfd.training.loop import Learner
from selfforcing_dfd.training.muon import Muon


def build_learner(network: nn.Module, config: OptimizerConfig, student_updates: int) -> Learner:
    """A network with AdamW. With kind muon, Muon takes the blocks' matrices."""
    rate = config.lr
    decay = config.weight_decay
    matrices, rest = split_parameters(network, config.kind)
    optimizers: list[Optimizer] = [
        torch.optim.AdamW(rest, lr=rate, betas=config.betas, weight_decay=decay)
    ]
    if matrices:
        muon = Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        optimizers.append(muon)
    # else both networks' gradients lie in memory, one of them unused
    for optimizer in optimizers:
        optimizer.register_step_post_hook(lambda used, *_: used.zero_grad(set_to_none=True))
    return Learner(network, tuple(optimizers), build_lr(config, student_updates), config.clip)


def split_parameters(
    network: nn.Module, kind: str
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters for Muon and those for AdamW."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        is_matrix = name.startswith("blocks.") and parameter.ndim == 2
        (matrices if kind == "muon" and is_matrix else rest).append(parameter)
    return matrices, rest


def build_lr(config: OptimizerConfig, student_updates: int) -> Callable[[int], float]:
    """Linear warm-up, then half a cosine from lr to decay * lr at the last update."""

    def lr(update: int) -> float:
        if update < config.warmup:
            return config.lr * (update + 1) / config.warmup
        progress = (update - config.warmup) / max(student_updates - config.warmup, 1)
        cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1)))
        return config.lr * (config.decay + (1 - config.decay) * cosine)

    return lr
