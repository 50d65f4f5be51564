"""Self-Forcing rollout (arXiv 2506.08009, Algorithm 1): the student generates its own context,
chunk by chunk.

Training and streaming call the same `denoise_chunk` and `commit_chunk`. Gradient reaches each
chunk's exit step only: the rollout runs without gradient and records what entered that step, and
`replay` repeats all exit steps in one pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from selfforcing_dfd.cache import Context, KVCache, PackedContext
from selfforcing_dfd.flow import add_noise, x0_from_flow
from selfforcing_dfd.network import Cache, Conditioning, Network, Past

Ladder = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Latent frames generated together; `start` counts from the beginning of the video."""

    start: int
    frames: int

    def of(self, latents: Tensor, dim: int = 1) -> Tensor:
        """This chunk's part of whole-video latents; `dim` is the axis of latent frames."""
        return latents.narrow(dim, self.start, self.frames)


@dataclass(frozen=True, slots=True)
class Rollout:
    """What the student made, with what `replay` needs. Nothing in it carries gradient."""

    x0: Tensor  # [B, F, C, H, W]
    x_exit: Tensor  # [B, F, C, H, W], what entered each chunk's exit step
    sigma_exit: tuple[float, ...]
    chunks: tuple[Chunk, ...]
    contexts: tuple[Context, ...]


def plan_chunks(num_frames: int, chunk_frames: int) -> tuple[Chunk, ...]:
    """Equal chunks over `num_frames` latent frames."""
    if num_frames % chunk_frames:
        upper = num_frames + -num_frames % chunk_frames
        raise ValueError(
            f"{num_frames} latent frames are no multiple of {chunk_frames} frames a chunk; use {upper}"
        )
    return tuple(Chunk(start, chunk_frames) for start in range(0, num_frames, chunk_frames))


@torch.no_grad()
def denoise_chunk(
    student: Network,
    noise: Tensor,
    conditioning: Conditioning,
    context: Past,
    ladder: Ladder,
    exit_step: int = -1,
) -> tuple[Tensor, Tensor]:
    """Few-step generation of one chunk: (x0 after ladder[exit_step], what entered that step).

    noise: [S, B, f, C, H, W], one draw a ladder step: the start, then what is added between steps.
    -1 is the last step.
    """
    x_t, last = noise[0], range(len(ladder))[exit_step]
    for step in range(last + 1):
        x0 = x0_from_flow(x_t, student(x_t, ladder[step], conditioning, context).flow, ladder[step])
        if step < last:
            x_t = add_noise(x0, noise[step + 1], ladder[step + 1])
    return x0, x_t


@torch.no_grad()
def commit_chunk(student: Network, x0: Tensor, conditioning: Conditioning, cache: Cache) -> None:
    """Run the finished chunk once more, clean, and remember its keys and values."""
    cache.append(student(x0, 0.0, conditioning, cache.read(x0.shape[1])).kv)


@torch.no_grad()
def rollout(
    student: Network,
    noise: Tensor,
    conditioning: Conditioning,
    cache: KVCache,
    ladder: Ladder,
    chunks: tuple[Chunk, ...],
    exit_steps: tuple[int, ...] = (),
    see: Callable[[Chunk, Tensor], Tensor] = lambda chunk, x0: x0,
) -> Rollout:
    """Generate all chunks in order from noise [S, B, F, C, H, W]; chunk i leaves the ladder at
    exit_steps[i].

    see(chunk, x0) is what becomes context, the student's own x0 by default; of the last chunk
    nothing does.
    """
    exit_steps = exit_steps or (-1,) * len(chunks)
    made, contexts = [], []
    for chunk, exit_step in zip(chunks, exit_steps, strict=True):
        contexts.append(cache.read(chunk.frames))
        made.append(
            denoise_chunk(
                student, chunk.of(noise, dim=2), conditioning, contexts[-1], ladder, exit_step
            )
        )
        if chunk is not chunks[-1]:
            commit_chunk(student, see(chunk, made[-1][0]), conditioning, cache)
    x0, x_exit = (torch.cat(parts, dim=1) for parts in zip(*made, strict=True))
    return Rollout(x0, x_exit, tuple(ladder[step] for step in exit_steps), chunks, tuple(contexts))


def replay(student: Network, record: Rollout, conditioning: Conditioning) -> Tensor:
    """The rollout's x0 [B, F, C, H, W] with gradient: all exit steps in one packed pass over the
    recorded context.

    Equal to differentiating chunk by chunk, since context carries no gradient.
    """
    frames = tuple(chunk.frames for chunk in record.chunks)
    x_t, per_chunk = record.x_exit, zip(record.sigma_exit, frames, strict=True)
    sigma = x_t.new_tensor([sigma for sigma, count in per_chunk for _ in range(count)]).expand(
        x_t.shape[:2]
    )
    return x0_from_flow(
        x_t, student(x_t, sigma, conditioning, PackedContext(record.contexts, frames)).flow, sigma
    )
