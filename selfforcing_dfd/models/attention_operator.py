"""Attention as one operator of torch: a compiled program calls it and never looks into a kernel.

Outside of compiled code the kernel is called directly: the operator is the same function, and its
dispatch would cost some ten microseconds a call.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from selfforcing_dfd.context import Attention
from selfforcing_dfd.models.attention import attend, attends_in_float32, load_kernel


@torch.library.custom_op("selfforcing_dfd::attention", mutates_args=())
def attend_operator(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, kernel: str) -> Tensor:
    """What compiled code calls; the arguments are those of `KernelAttention`."""
    attended = loaded(kernel, q.device.type)(q, *seen(k, v, visible))
    return attended.contiguous()  # as the registration below promises


@torch.library.custom_op("selfforcing_dfd::attention_backward", mutates_args=())
def backward_operator(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, kernel: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v by the kernel's own backward pass, after its forward pass again.

    What the first forward pass kept is not handed over: every kernel keeps something else.
    """
    # torch runs operators without autograd, which this one needs inside
    autograd_is_off = torch._C._SetExcludeDispatchKeyGuard(
        torch._C.DispatchKey.AutogradFunctionality, False
    )
    with autograd_is_off, torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        attended = loaded(kernel, q.device.type)(q, *seen(k, v, visible))
        of_q, of_k, of_v = torch.autograd.grad(attended, (q, k, v), grad)
    return of_q.contiguous(), of_k.contiguous(), of_v.contiguous()


@attend_operator.register_fake
def _attended(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, kernel: str) -> Tensor:
    return q.new_empty(q.shape)


@backward_operator.register_fake
def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, kernel: str
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.kernel = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradients = backward_operator(grad, *ctx.saved_tensors, ctx.kernel)
    return (*gradients, None, None)


attend_operator.register_autograd(_backward, setup_context=_keep)


@cache
def loaded(kernel: str, device_type: str) -> Attention:
    """The function of a kernel by its name; one of FlashAttention was chosen, so it is there."""
    return load_kernel(kernel, torch.device(device_type))


def seen(k: Tensor, v: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor]:
    """The keys and values from visible[0] to before visible[1]; None: all."""
    if visible is None:
        return k, v
    first, last = visible.tolist()
    return k[:, first:last], v[:, first:last]


def call_operator(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, kernel: str) -> Tensor:
    """The operator, with gradients on a CPU in float32 as `attend` has them."""
    if attends_in_float32(q):
        wide = call_operator(q.float(), k.float(), v.float(), visible, kernel)
        return wide.type_as(q)
    attended: Tensor = attend_operator(q, k, v, visible, kernel)
    return attended


@dataclass(frozen=True, slots=True)
class KernelAttention:
    """Attention by one kernel; `name` is what `load_kernel` knows it by."""

    name: str = "sdpa"
    function: Attention = attend

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
        """Full attention without a mask.

        q: [B, Lq, heads, head_dim]; k, v: [B, Lk, heads, head_dim] -> like q. visible: [2] on the
        CPU, the first key that is seen and the one after the last; None: all.
        """
        if torch.compiler.is_compiling():
            return call_operator(q, k, v, visible, self.name)
        return self.function(q, *seen(k, v, visible))


@dataclass(frozen=True, slots=True)
class Slots:
    """Keys and values of one layer in a buffer, for compiled code.

    What moves from chunk to chunk is in tensors, so that one program serves all chunks. keys,
    values: [B, slots * tokens, heads, head_dim]. own: indices of this chunk's tokens in them.
    visible: [2] on the CPU, as `KernelAttention` takes it.
    """

    keys: Tensor
    values: Tensor
    own: Tensor
    visible: Tensor

    def attend(self, attention: KernelAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write this chunk's keys and values into its slot, and attend over what is visible."""
        self.keys.index_copy_(1, self.own, k)
        self.values.index_copy_(1, self.own, v)
        return attention(q, self.keys, self.values, self.visible)


@runtime_checkable
class SlotContext(Protocol):
    """A context whose keys and values lie in slots: a stream's."""

    def slots(self, layer: int) -> Slots: ...
