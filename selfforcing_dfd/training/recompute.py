"""Activation checkpointing: what the backward pass computes again, so that it need not be kept."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from selfforcing_dfd.models.wan import WanTransformer

Recompute = Literal["none", "selective", "full"]

ATTENTION = ("attention", "flash_attn")
"""In the name of every operation that is attention: torch's, and those of the flash packages."""


def recompute(network: WanTransformer, what: Recompute) -> None:
    """From now on every block with gradient keeps its input alone and runs again when needed.

    selective: self-attention and cross-attention are kept and do not run again. They cost most at
    Wan's length (198 of 283 TFLOP a pass), and keeping them as much memory as the inputs twice.
    """
    if what == "full":
        network.enable_gradient_checkpointing()
    elif what == "selective":
        contexts = partial(create_selective_checkpoint_contexts, keep_attention)
        network.enable_gradient_checkpointing(
            partial(checkpoint, use_reentrant=False, context_fn=contexts)
        )


def keep_attention(
    context: object, operation: torch._ops.OpOverload, *args: Any, **named: Any
) -> CheckpointPolicy:
    """What torch does with one operation's result."""
    name = str(operation)
    if any(word in name for word in ATTENTION):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
