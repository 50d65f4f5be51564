"""Calls of a student over fixed memory, so that a captured CUDA graph serves every chunk.

A graph repeats kernels with the very addresses and sizes that they were captured with. So all that
changes from chunk to chunk is copied into tensors that stay where they are: the noisy latents, the
indices of the chunk's slot, its rotary positions, and the text's keys and values. The ring's
buffers stay in place anyway. What is left makes a graph of its own: a noise level, and how many
slots are visible, which is the size of attention: of K = 12 with chunks of 3 four graphs for each
step and the commit pass, of which one is replayed once the window is full.

Without capture the same path runs everywhere, and a test holds it against the plain one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from selfforcing_dfd.common import UserError
from selfforcing_dfd.context import Attention, ChunkKV, Conditioning, Context, NetworkOutput
from selfforcing_dfd.models.attention_operator import Slots
from selfforcing_dfd.models.layers import full_precision
from selfforcing_dfd.models.network import WanNetwork
from selfforcing_dfd.models.prepared import PreparedConditioning
from selfforcing_dfd.models.rope import positions_rotary
from selfforcing_dfd.streaming.model import StreamModel
from selfforcing_dfd.streaming.ring import RingContext

Key = tuple[float, int, int]  # noise level, first and last visible token


@dataclass(frozen=True, slots=True)
class StaticContext:
    """What a `RingContext` says, in tensors that stay in place. rotary: cos and sin."""

    keys: Tensor
    values: Tensor
    own_tokens: Tensor
    visible: slice
    visible_span: Tensor
    rotary: tuple[Tensor, Tensor]
    next_frame = 0  # positions come from `rotary`
    wants_kv = False

    def slots(self, layer: int) -> Slots:
        return Slots(self.keys[layer], self.values[layer], self.own_tokens, self.visible_span)

    def attend(self, attention: Attention, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys = self.keys[layer].index_copy_(1, self.own_tokens, k)
        values = self.values[layer].index_copy_(1, self.own_tokens, v)
        return attention(q, keys[:, self.visible], values[:, self.visible])


@dataclass(slots=True)
class Inputs:
    """The fixed tensors of calls with one kind of latents, and the calls themselves."""

    x_t: Tensor
    own_tokens: Tensor
    rotary: tuple[Tensor, Tensor]
    flow: Tensor  # what every program writes its result into
    programs: dict[Key, Callable[[], Tensor]] = field(default_factory=dict)
    context: RingContext | None = None  # what own_tokens and rotary were filled from


@dataclass(slots=True)
class StaticStudent:
    """A student in fixed memory; of one session, since the ring belongs to it.

    capture: each program is captured as a CUDA graph when it is first called. Without, it runs as
    it is. The flow that a call returns is written over by the next call of the same kind.
    """

    student: WanNetwork
    capture: bool
    # by shape and dtype of the latents
    _inputs: dict[tuple[torch.Size, torch.dtype], Inputs] = field(default_factory=dict)
    _conditioning: PreparedConditioning | None = None  # in place
    _filled_from: Conditioning | None = None
    _pool: Any = None  # memory that all graphs share: they never run at once
    _side: torch.cuda.Stream | None = None  # on which they are captured

    @property
    def num_programs(self) -> int:
        return sum(len(inputs.programs) for inputs in self._inputs.values())

    def __call__(
        self,
        x_t: Tensor,
        sigma: Tensor | float,
        conditioning: Conditioning,
        context: Context | None = None,
    ) -> NetworkOutput:
        """As the student's own call; frames of several noise levels take that one."""
        prepared = isinstance(conditioning, PreparedConditioning)
        if not (isinstance(context, RingContext) and prepared) or isinstance(sigma, Tensor):
            return self.student(x_t, sigma, conditioning, context)
        assert isinstance(conditioning, PreparedConditioning)
        self._fill_conditioning(conditioning)
        inputs = self._fill_inputs(x_t, context)
        key = (sigma, context.visible.start, context.visible.stop)
        if key not in inputs.programs:
            inputs.programs[key] = self._program(inputs, sigma, context)
        return NetworkOutput(inputs.programs[key](), ChunkKV(x_t.shape[1], ()))

    def _fill_conditioning(self, conditioning: PreparedConditioning) -> None:
        """Copy the text's keys and values, where they are not those of the last call.

        The noise levels do not depend on the text. A text of another shape needs other programs.
        """
        if conditioning is self._filled_from:
            return
        own = self._conditioning
        if own is None or own.text_kv[0][0].shape != conditioning.text_kv[0][0].shape:
            text_kv = tuple((k.clone(), v.clone()) for k, v in conditioning.text_kv)
            self._conditioning = replace(conditioning, text_kv=text_kv)
            self._inputs.clear()
        else:
            for (own_k, own_v), (k, v) in zip(own.text_kv, conditioning.text_kv, strict=True):
                own_k.copy_(k)
                own_v.copy_(v)
        self._filled_from = conditioning

    def _fill_inputs(self, x_t: Tensor, context: RingContext) -> Inputs:
        """Copy the latents and, at the first call of a chunk, its slot and its positions."""
        kind = (x_t.shape, x_t.dtype)
        inputs = self._inputs.get(kind)
        if inputs is not None and inputs.context is context:
            inputs.x_t.copy_(x_t)
            return inputs
        cos, sin = self._rotary(x_t, context.next_frame)
        if inputs is None:
            rotary = (cos.clone(), sin.clone())
            flow = x_t.new_empty(x_t.shape, dtype=self.student.patch_embedding.weight.dtype)
            inputs = Inputs(x_t.clone(), context.own_tokens.clone(), rotary, flow)
            self._inputs[kind] = inputs
        else:
            inputs.x_t.copy_(x_t)
            inputs.own_tokens.copy_(context.own_tokens)
            inputs.rotary[0].copy_(cos)
            inputs.rotary[1].copy_(sin)
        inputs.context = context
        return inputs

    def _rotary(self, x_t: Tensor, next_frame: int) -> tuple[Tensor, Tensor]:
        sizes = (x_t.shape[1], *x_t.shape[3:])
        grid = [size // patch for size, patch in zip(sizes, self.student.patch, strict=True)]
        precision = full_precision(self.student.patch_embedding.weight[:0]).dtype
        rows, columns = grid[1:]
        head_dim = self.student.head_dim
        return positions_rotary(next_frame, grid[0], rows, columns, head_dim, x_t.device, precision)

    def _program(self, inputs: Inputs, sigma: float, context: RingContext) -> Callable[[], Tensor]:
        """A call of these inputs at a noise level, which returns the flow in fixed memory."""
        static = StaticContext(
            context.keys,
            context.values,
            inputs.own_tokens,
            context.visible,
            context.visible_span,
            inputs.rotary,
        )
        conditioning = self._conditioning
        assert conditioning is not None

        def call() -> Tensor:
            return inputs.flow.copy_(self.student(inputs.x_t, sigma, conditioning, static).flow)

        return self._captured(call, inputs.flow) if self.capture else call

    def _captured(self, call: Callable[[], Tensor], flow: Tensor) -> Callable[[], Tensor]:
        """The call as a graph, after it has run once beside it, as CUDA wants it.

        flow: what it writes its result into.
        """
        device = flow.device
        if self._side is None:
            self._side = torch.cuda.Stream(device)
            self._pool = torch.cuda.graph_pool_handle()
        present = torch.cuda.current_stream(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):  # it may not be the first GPU
            self._side.wait_stream(present)
            with torch.cuda.stream(self._side):
                call()
            present.wait_stream(self._side)
            # other threads go on meanwhile: they drop frames, and ask whether copies are done
            with torch.cuda.graph(graph, self._pool, self._side, "thread_local"):
                call()

        def replay() -> Tensor:
            graph.replay()
            return flow

        return replay


def with_graphs(model: StreamModel) -> StreamModel:
    """The same model, whose streams replay captured CUDA graphs.

    Raises UserError for what cannot be captured.
    """
    if model.device.type != "cuda":
        raise UserError(
            f"--cuda-graph captures the work of a GPU, and the student is on {model.device}; "
            "drop it, or use --device cuda"
        )
    check_static(model)
    return replace(model, calls="graph")


def check_static(model: StreamModel) -> None:
    """Raise UserError for a student whose calls are not all in fixed memory."""
    if model.student.takes_picture:
        raise UserError(
            "--cuda-graph is for text-to-video students: one of Wan2.1-I2V sees other channels of "
            "its picture in every chunk; drop it"
        )
    if model.student.groups is not None or model.run_device is not None:
        raise UserError(
            "--cuda-graph needs the student's weights in one place, and offloaded ones move; drop "
            "it, or --offload"
        )
    if model.student.sequence_parallel is not None:
        raise UserError(
            "--cuda-graph is for one process: several exchange tokens within a call; drop it, or "
            "start without torchrun"
        )
