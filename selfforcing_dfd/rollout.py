"""Self-Forcing rollout (arXiv 2506.08009, Algorithm 1): the student generates its own context, chunk by chunk.

Training and streaming call the same `denoise_chunk` and `commit_chunk`. Gradient reaches each chunk's exit step only: the
rollout runs without gradient and records what entered that step, and `replay` repeats all exit steps in one packed pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from selfforcing_dfd.cache import Conditioning, Context, KVCache, Network, PackedContext
from selfforcing_dfd.flow import add_noise, x0_from_flow

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
    """What the student made, with what `replay` needs. Nothing in it carries gradient.

    x0, x_exit: [B, F, C, H, W], the result of each chunk and what entered its exit step; sigma_exit: one per chunk.
    """

    x0: Tensor
    x_exit: Tensor
    sigma_exit: tuple[float, ...]
    chunks: tuple[Chunk, ...]
    contexts: tuple[Context, ...]


def plan_chunks(num_frames: int, chunk_frames: int) -> tuple[Chunk, ...]:
    """Equal chunks over `num_frames` latent frames."""
    if num_frames % chunk_frames:
        lower = num_frames - num_frames % chunk_frames
        raise ValueError(
            f"{num_frames} latent frames are no multiple of {chunk_frames} frames a chunk; "
            f"use {lower or lower + chunk_frames} or {lower + chunk_frames}"
        )
    return tuple(Chunk(start, chunk_frames) for start in range(0, num_frames, chunk_frames))


@torch.no_grad()
def denoise_chunk(
    student: Network, noise: Tensor, conditioning: Conditioning, context: Context, ladder: Ladder, exit_step: int = -1
) -> tuple[Tensor, Tensor]:
    """Few-step generation of one chunk: (x0 after ladder[exit_step], what entered that step).

    noise: [S, B, f, C, H, W], one draw per ladder step: the start, then what is added between steps. -1 is the last step.
    """
    steps, x_t = range(len(ladder))[: exit_step % len(ladder) + 1], noise[0]
    for step in steps:
        x0 = x0_from_flow(x_t, student(x_t, ladder[step], conditioning, context).flow, ladder[step])
        if step < steps[-1]:
            x_t = add_noise(x0, noise[step + 1], ladder[step + 1])
    return x0, x_t


@torch.no_grad()
def commit_chunk(
    student: Network, x0: Tensor, conditioning: Conditioning, cache: KVCache, context_sigma: float = 0.0
) -> None:
    """Run the finished chunk once more as clean context and remember its keys and values."""
    cache.append(student(x0, context_sigma, conditioning, cache.read(x0.shape[1])).kv)


@torch.no_grad()
def rollout(
    student: Network,
    noise: Tensor,
    conditioning: Conditioning,
    cache: KVCache,
    ladder: Ladder,
    chunks: tuple[Chunk, ...],
    exit_steps: tuple[int, ...] | None = None,
) -> Rollout:
    """Generate all chunks in order from noise [S, B, F, C, H, W]; chunk i leaves the ladder at exit_steps[i].

    The last chunk is not committed: nothing comes after it.
    """
    exit_steps = exit_steps or (len(ladder) - 1,) * len(chunks)
    x0s, x_exits, contexts = [], [], []
    for chunk, exit_step in zip(chunks, exit_steps, strict=True):
        contexts.append(cache.read(chunk.frames))
        x0, x_exit = denoise_chunk(student, chunk.of(noise, dim=2), conditioning, contexts[-1], ladder, exit_step)
        x0s.append(x0)
        x_exits.append(x_exit)
        if chunk is not chunks[-1]:
            commit_chunk(student, x0, conditioning, cache)
    sigma_exit = tuple(ladder[step] for step in exit_steps)
    return Rollout(torch.cat(x0s, dim=1), torch.cat(x_exits, dim=1), sigma_exit, chunks, tuple(contexts))


def replay(student: Network, record: Rollout, conditioning: Conditioning) -> Tensor:
    """The rollout's x0 [B, F, C, H, W] with gradient: all exit steps in one packed pass over the recorded context.

    Equal to differentiating chunk by chunk, since context carries no gradient.
    """
    frames = tuple(chunk.frames for chunk in record.chunks)
    sigma = record.x_exit.new_tensor(record.sigma_exit).repeat_interleave(record.x_exit.new_tensor(frames).long())
    sigma = sigma.expand(record.x_exit.shape[:2])
    flow = student(record.x_exit, sigma, conditioning, PackedContext(record.contexts, frames)).flow
    return x0_from_flow(record.x_exit, flow, sigma)
