"""A stream on a plain cache, to compare `StreamSession` with: same network, noise and video.

The cache does what public streaming code does (survey of nine projects). Past and present are
concatenated in every layer of every call. Keys are stored before rotation, and the whole window is
rotated in each call through a complex128 table. The text's K/V are computed in each call.
Forgetting is slicing and cloning. Nothing is compiled.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

from selfforcing_dfd import rng
from selfforcing_dfd.context import Attention, ChunkKV, Conditioning, Context, NetworkOutput
from selfforcing_dfd.models.layers import modulate
from selfforcing_dfd.models.rope import axis_dims, axis_frequencies
from selfforcing_dfd.models.wan import WanBlock, WanTransformer
from selfforcing_dfd.rollout import commit_chunk, denoise_chunk
from selfforcing_dfd.streaming.latency import Timings
from selfforcing_dfd.streaming.output import FrameCopy
from selfforcing_dfd.streaming.session import (
    StreamChunk,
    StreamModel,
    StreamSession,
    StreamSettings,
)

TABLE_ROWS = 1024  # positions, as in the public code; the window never reaches that far
COSTS = ("concatenate", "rotate", "text", "forget")
"""Names of the ranges that a profiler sees: what this cache does and a ring of slots need not."""

PRODUCTS = re.compile(
    r"aten::(addmm|mm|bmm|baddbmm|\w*conv\w*|_scaled_dot_product\w*|_\w*_attention_forward)|flash_attn\w*::\w+"
)
"""Operators that do the matrix products, convolutions and attention; their own time, without what
they call.
"""


def rotary_table(head_dim: int, device: torch.device) -> tuple[Tensor, ...]:
    """exp(i position frequency), complex128 [TABLE_ROWS, d / 2], for each axis."""
    positions = torch.arange(TABLE_ROWS, dtype=torch.float64, device=device)
    angles = (torch.outer(positions, axis_frequencies(dim, device)) for dim in axis_dims(head_dim))
    return tuple(torch.polar(torch.ones_like(angle), angle) for angle in angles)


def rotate_by_table(
    x: Tensor, table: tuple[Tensor, ...], grid: tuple[int, int], start_frame: int
) -> Tensor:
    """Rotate x [B, frames * rows * columns, heads, head_dim] from latent frame `start_frame` on.

    grid: rows and columns.
    """
    rows, columns = grid
    frames = x.shape[1] // (rows * columns)
    (time, row, column) = table
    size = (frames, rows, columns, -1)
    turns = [
        time[start_frame : start_frame + frames, None, None].expand(size),
        row[None, :rows, None].expand(size),
        column[None, None, :columns].expand(size),
    ]
    factors = torch.cat(turns, dim=-1).flatten(0, 2)[:, None]
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * factors).flatten(-2).type_as(x)


@dataclass(frozen=True, slots=True)
class NaivePast:
    """Sink and history as keys before rotation, with their values, and the rotary table."""

    # [B, frames * tokens, heads, head_dim], the oldest first
    layers: tuple[tuple[Tensor, Tensor], ...]
    table: tuple[Tensor, ...]
    grid: tuple[int, int]
    next_frame = 0  # nothing is rotated before it comes here
    wants_kv = True

    def attend(self, attention: Attention, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q and k before rotation; positions count from the sink's first latent frame."""
        with record_function("concatenate"):
            parts = zip(*self.layers[layer : layer + 1], (k, v), strict=True)
            keys, values = (torch.cat(part, dim=1) for part in parts)
        with record_function("rotate"):
            before = (keys.shape[1] - q.shape[1]) // (self.grid[0] * self.grid[1])
            q, keys = (
                rotate_by_table(x, self.table, self.grid, at) for x, at in ((q, before), (keys, 0))
            )
        return attention(q, keys, values)


@dataclass(slots=True)
class NaiveCache:
    """Keys and values as lists that grow by concatenation.

    Lists that are too long are cut and cloned.
    """

    table: tuple[Tensor, ...]
    grid: tuple[int, int]
    sink_frames: int
    window_frames: int
    _layers: tuple[tuple[Tensor, Tensor], ...] = field(default=())

    def read(self, next_frames: int = 0) -> NaivePast:
        return NaivePast(self._layers, self.table, self.grid)

    def append(self, kv: ChunkKV) -> None:
        """Store keys before rotation, and keep what a next chunk of the same size will see."""
        old = self._layers or tuple((k[:, :0], v[:, :0]) for k, v in kv.layers)
        with record_function("forget"):
            self._layers = tuple(
                (
                    self._cut(torch.cat([old_k, k], dim=1), kv.frames),
                    self._cut(torch.cat([old_v, v], dim=1), kv.frames),
                )
                for (old_k, old_v), (k, v) in zip(old, kv.layers, strict=True)
            )

    def _cut(self, x: Tensor, chunk_frames: int) -> Tensor:
        tokens = self.grid[0] * self.grid[1]
        sink = self.sink_frames * tokens
        history = (self.window_frames - chunk_frames) * tokens
        if x.shape[1] <= sink + history:
            return x
        return torch.cat([x[:, :sink].clone(), x[:, x.shape[1] - history :].clone()], dim=1)


@dataclass(frozen=True, slots=True)
class NaiveNetwork:
    """The same weights and the same flow; queries and keys reach the cache before rotation."""

    network: WanTransformer

    def __call__(
        self,
        x_t: Tensor,
        sigma: Tensor | float,
        conditioning: Conditioning,
        context: Context | None = None,
    ) -> NetworkOutput:
        assert context is not None
        network = self.network
        tokens, grid = network.patchify(x_t)
        level = network.level_of(sigma, x_t, Conditioning(conditioning.text))
        with record_function("text"):
            text = network.prepare(Conditioning(conditioning.text)).text_kv
        layers = []
        for layer, block in enumerate(network.wan_blocks()):
            shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(level.blocks[layer])
            q, k, v = unrotated(block, tokens, shift1, scale1)
            attended = context.attend(block.attend, layer, q, k, v)
            values = (gate1, shift2, scale2, gate2, *text[layer])
            # of the class: not what was compiled
            tokens = WanBlock.after_attention(block, tokens, attended, *values)
            layers.append((k, v))
        shift, scale = level.head
        tokens = modulate(network.norm_out(tokens), scale, shift).type_as(tokens)
        flow = network.unpatchify(network.proj_out(tokens), grid)
        return NetworkOutput(flow, ChunkKV(x_t.shape[1], tuple(layers)))


def unrotated(
    block: WanBlock, x: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of self-attention, each [B, tokens, heads, head_dim]."""
    normed = modulate(block.norm1(x), scale, shift).type_as(x)
    return block.attn1.queries(normed), *block.attn1.keys_values(normed)


class NaiveSession:
    """`StreamSession` on the naive cache: one prompt, no context, the same order of work.

    Raises ValueError for an absolute sink: this cache counts positions from zero for each chunk, so
    it cannot place one.
    """

    def __init__(self, model: StreamModel, prompt: str, settings: StreamSettings) -> None:
        if settings.positions == "absolute" and settings.sink_frames:
            raise ValueError(
                f"the naive cache counts positions from the sink; positions {settings.positions!r} "
                f"with {settings.sink_frames} sink_frames cannot be compared: use sink_relative, "
                "or sink_frames 0"
            )
        student = model.student
        (rows, columns) = model.latent_size
        self.model = model
        self.settings = settings
        self.chunk_index = 0
        self._network = NaiveNetwork(student)
        grid = (rows // student.patch[1], columns // student.patch[2])
        table = rotary_table(student.head_dim, model.device)
        self._cache = NaiveCache(table, grid, settings.sink_frames, settings.window_frames)
        self._conditioning = Conditioning(model.text.encode([prompt]).to(model.device, model.dtype))
        self._decoder = model.codec.start_decoding()
        self.latents = torch.empty(0)  # the newest chunk, [1, f, C, h, w]

    @torch.no_grad()
    def next_chunk(self) -> StreamChunk:
        started = time.perf_counter()
        if self.chunk_index:
            commit_chunk(self._network, self.latents, self._conditioning, self._cache)
        past = self._cache.read(self.model.chunk_frames)
        x0, _ = denoise_chunk(
            self._network, self._noise(), self._conditioning, past, self.model.ladder
        )
        copy = FrameCopy(x0.shape[1] * self.model.codec.strides[0])
        latents = x0.to(self.model.decode_device or x0.device)
        for frame in range(latents.shape[1]):
            copy.add(self._decoder.decode(latents[:, frame : frame + 1])[0])
        self.latents = x0
        _, first_ready = copy.first()
        frames = copy.all()
        total, first = (1000 * (moment - started) for moment in (time.perf_counter(), first_ready))
        self.chunk_index += 1
        return StreamChunk(self.chunk_index - 1, frames, Timings(total, first, {}))

    def _noise(self) -> Tensor:
        """The draws of `StreamSession`."""
        model = self.model
        shape = (1, model.chunk_frames, model.codec.channels, *model.latent_size)
        seed = self.settings.seed
        steps = range(len(model.ladder))
        draws = [rng.normal(shape, seed, "stream noise", self.chunk_index, step) for step in steps]
        return torch.stack(draws).to(model.device)


def compare_with_naive(
    model: StreamModel, prompt: str, settings: StreamSettings, num_chunks: int
) -> dict[str, Any]:
    """Both caches in one run, one chunk each in turn, when window and sink are full: medians.

    matrix_products_ms: time of matrix products in a chunk of ours, by a profiler; both need them.
    least_possible_ratio: this over the naive median; no cache can be faster. naive_costs_ms: time
    of the naive cache's own work, its share of the profiled time taken of the median, since a
    profiler makes small operators slower. ratio_without_naive_costs: what would be left without
    any of it. A ring does not reach that either, since it must rotate and store the current chunk.
    """
    ours = StreamSession(model, prompt, settings)
    naive = NaiveSession(model, prompt, settings)
    for _ in range(ours.visible_frames // model.chunk_frames + 1):
        ours.next_chunk()
        naive.next_chunk()
    samples: tuple[list[float], list[float]] = ([], [])
    for i in range(num_chunks):
        turns = [(samples[0], ours.next_chunk), (samples[1], naive.next_chunk)]
        # what one leaves warm or hot falls on either alike
        for sink, work in turns if i % 2 else reversed(turns):
            sink.append(wall_ms(work, model.device))
    ours_ms, naive_ms = (median(times) for times in samples)
    num_profiled = max(1, min(3, num_chunks // 10))
    found, _ = profiled_ms(ours.next_chunk, model.device, num_profiled, PRODUCTS.fullmatch)
    products = sum(found.values())
    found, wall = profiled_ms(naive.next_chunk, model.device, num_profiled, COSTS.__contains__)
    costs = {name: found[name] / wall for name in COSTS}
    ratios = [one / other for one, other in zip(*samples, strict=True)]
    return {
        "num_chunks": num_chunks,
        "ours_p50_ms": ours_ms,
        "naive_p50_ms": naive_ms,
        "ratio": ours_ms / naive_ms,
        "ratio_p50_of_pairs": median(ratios),
        "matrix_products_ms": products,
        "least_possible_ratio": products / naive_ms,
        "naive_costs_ms": {name: share * naive_ms for name, share in costs.items()},
        "ratio_without_naive_costs": 1 - sum(costs.values()),
    }


def wall_ms(work: Callable[[], object], device: torch.device) -> float:
    """Time until the device is idle: a commit pass that goes on belongs to its own chunk."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - started)


def profiled_ms(
    work: Callable[[], object],
    device: torch.device,
    num_calls: int,
    wanted: Callable[[str], object],
) -> tuple[dict[str, float], float]:
    """Milliseconds a call, by name and in total.

    A name is an operator, or a range with all that runs in it.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as result:
        wall = sum(wall_ms(work, device) for _ in range(num_calls)) / num_calls
    totals: dict[str, float] = {}
    for event in result.key_averages():
        whole = event.device_time_total if on_gpu else event.cpu_time_total
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if wanted(event.key):
            microseconds = whole if event.key in COSTS else own
            totals[event.key] = totals.get(event.key, 0.0) + microseconds / 1000 / num_calls
    return totals, wall
