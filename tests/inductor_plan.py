"""The kernels that inductor plans for a graph, without building one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch._inductor.exc import InductorError
from torch._inductor.graph import GraphLowering
from torch._inductor.ir import FixedLayout, MultiOutput
from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode

from selfforcing_dfd.benchmark.operators import Work


class Planned(Exception):
    """Ends a compilation whose plan has been read."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Kernels that inductor writes itself, with their bytes, and calls of ready ones.

    largest: numbers in the largest tensor that the program makes for itself.
    """

    written: Work
    called: int
    largest: int


def planned(call: Callable[[], Any]) -> Plan:
    """The plan of the one graph that a call compiles.

    Bytes are as inductor estimates them. It charges a store into a part of a room with the whole
    room, so the true number is smaller.
    """
    written = Work(0, 0)
    called = 0
    largest = 0

    def plan(graph: Any) -> None:
        nonlocal written, called, largest
        graph.init_wrapper_code()
        graph._update_scheduler()
        for node in graph.scheduler.nodes:
            if isinstance(node, ExternKernelSchedulerNode):
                called += not isinstance(node.node, MultiOutput)
            elif not isinstance(node, NopKernelSchedulerNode):
                written += Work(1, node.get_read_write_buffers_sizes())
        made = [buffer for buffer in graph.buffers if isinstance(buffer.layout, FixedLayout)]
        largest = max(int(buffer.get_numel()) for buffer in made)
        raise Planned

    with (
        patch.object(GraphLowering, "compile_to_module", plan),
        pytest.raises(InductorError, match="Planned"),
    ):
        call()
    return Plan(written, called, largest)


def use_fake_weights(module: nn.Module) -> None:
    """Replace weights on the meta device by fake ones on the CPU, for which inductor plans."""
    for part in module.modules():
        for name, weight in list(part.named_parameters(recurse=False)):
            fake = torch.empty_strided(weight.size(), weight.stride(), dtype=weight.dtype)
            setattr(part, name, nn.Parameter(fake, requires_grad=False))
