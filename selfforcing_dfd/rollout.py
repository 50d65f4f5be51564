"""Self-Forcing rollout (arXiv 2506.08009, Algorithm 1): the student makes its own context.

Training and streaming share `denoise_chunk` and `commit_chunk`. Only exit steps have gradient:
`rollout` records what entered them, and `replay` repeats those of all chunks in one pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from selfforcing_dfd.context import (
    Cache,
    Conditioning,
    Context,
    Network,
    PackedContext,
    check_frames,
)
from selfforcing_dfd.flow import add_noise, sigma_by_frame, x0_from_flow

Ladder = tuple[float, ...]  # decreasing sigmas of few-step sampling, from 1
Sigma = Tensor | float


@dataclass(frozen=True, slots=True)
class Chunk:
    """Latent frames generated together; `start` counts from the beginning of the video."""

    start: int
    frames: int

    def of(self, latents: Tensor, dim: int = 1) -> Tensor:
        """This chunk's part of whole-video latents; `dim` is the axis of latent frames."""
        return latents.narrow(dim, self.start, self.frames)


Chunks = tuple[Chunk, ...]  # of one video, in order


@dataclass(frozen=True, slots=True)
class Rollout:
    """What the student made, and what `replay` needs. No gradient. A context for each chunk."""

    x0: Tensor  # [B, F, C, H, W]
    x_exit: Tensor  # [B, F, C, H, W], what entered each chunk's exit step
    sigma_exit: Tensor  # [B, F], at which each frame entered it; 0 where it was given
    chunks: Chunks
    contexts: tuple[Context, ...]


@dataclass(frozen=True, slots=True)
class RealRows:
    """In these rows [B] (bool), real latents [B, F, C, H, W] take the place of the student's."""

    latents: Tensor
    rows: Tensor

    def instead_of(self, x0: Tensor, chunk: Chunk) -> Tensor:
        return torch.where(self.rows[:, None, None, None, None], chunk.of(self.latents), x0)


def plan_chunks(num_frames: int, chunk_frames: int) -> Chunks:
    """Equal chunks over `num_frames` latent frames. Raises ValueError if they do not fit."""
    check_frames("clip", num_frames, chunk_frames)
    return tuple(Chunk(start, chunk_frames) for start in range(0, num_frames, chunk_frames))


@torch.no_grad()
def denoise_chunk(
    student: Network,
    noise: Sequence[Tensor] | Tensor,
    conditioning: Conditioning,
    context: Context,
    ladder: Ladder,
    exit_step: int | None = None,
    real_input: Callable[[Tensor], Tensor] | None = None,
    given: Tensor | None = None,
    remember: Cache | None = None,
) -> tuple[Tensor, Tensor]:
    """Few-step generation of one chunk: (x0 after the exit step, what entered that step).

    noise: [S, B, f, C, H, W], a draw for each step of the ladder: the start, then what is added
    between steps. With one draw, x_t keeps it: Euler's steps along the flow (DDIM, arXiv
    2010.02502). exit_step: index into the ladder; None is its last step. real_input: puts real
    latents into rows of what is noised for the exit step. given: clean latents [B, g, C, H, W] that
    the chunk begins with; at sigma 0 they stay as they are. remember: gets the last call's K/V.
    """
    last_step = len(ladder) - 1 if exit_step is None else exit_step
    sigmas: list[Sigma] = list(ladder)
    x_t = noise[0]
    if given is not None:
        x_t = torch.cat([given, x_t[:, given.shape[1] :]], dim=1)
        sigmas = [sigma_by_frame(sigma, x_t, given.shape[1]) for sigma in ladder]
    for step in range(last_step):
        flow = student(x_t, sigmas[step], conditioning, context).flow
        x0 = x0_from_flow(x_t, flow, sigmas[step])
        if real_input is not None and step == last_step - 1:
            x0 = real_input(x0)
        kept = x_t + (1 - ladder[step]) * flow
        x_t = add_noise(x0, kept if len(noise) == 1 else noise[step + 1], sigmas[step + 1])
    out = student(x_t, sigmas[last_step], conditioning, context)
    if remember is not None:
        remember.append(out.kv)
    return x0_from_flow(x_t, out.flow, sigmas[last_step]), x_t


@torch.no_grad()
def commit_chunk(
    student: Network, x: Tensor, conditioning: Conditioning, cache: Cache, sigma: Sigma = 0.0
) -> None:
    """Run the finished chunk x [B, f, C, H, W] once more, and remember its K/V.

    It is clean, but for students without commit pass: then it has their last step's noise level.
    """
    cache.append(student(x, sigma, conditioning, cache.read(x.shape[1])).kv)


@torch.no_grad()
def rollout(
    student: Network,
    noise: Tensor,
    conditioning: Conditioning,
    cache: Cache,
    ladder: Ladder,
    chunks: Chunks,
    exit_steps: tuple[int, ...] | None = None,
    real_past: RealRows | None = None,
    real_input: RealRows | None = None,
    given: Tensor | None = None,
    first_ladder: Ladder | None = None,
    commits: bool = True,
) -> Rollout:
    """Generate all chunks in order from noise [S, B, F, C, H, W].

    exit_steps: for each chunk an index into its ladder; None is the last step. real_past: is
    committed in place of the student's chunks. real_input: is noised for the exit step in place of
    them. given, first_ladder: of the first chunk. The last chunk is never committed. commits: else
    the last step's K/V are the context; after an earlier exit, or for a real past, those of one
    more pass at its noise level.
    """
    ladders = (first_ladder or ladder, *(ladder,) * (len(chunks) - 1))
    exit_steps = exit_steps or tuple(len(each) - 1 for each in ladders)
    made = []
    for chunk, steps, step in zip(chunks, ladders, exit_steps, strict=True):
        context = cache.read(chunk.frames)
        real = None if real_input is None else partial(real_input.instead_of, chunk=chunk)
        own = given if chunk is chunks[0] else None
        num_given = 0 if own is None else own.shape[1]
        is_last = chunk is chunks[-1]
        at_end = not (commits or is_last) and real_past is None and step == len(steps) - 1
        draws = chunk.of(noise, 2)
        options = (real, own, cache if at_end else None)
        x0, x_exit = denoise_chunk(student, draws, conditioning, context, steps, step, *options)
        if not (is_last or at_end):
            past = x0 if real_past is None else real_past.instead_of(x0, chunk)
            level: Sigma = 0.0
            if not commits:
                level = sigma_by_frame(steps[-1], past, num_given)
                past = add_noise(past, draws[: len(steps)][-1], level)
            commit_chunk(student, past, conditioning, cache, level)
        made.append((x0, x_exit, sigma_by_frame(steps[step], x_exit, num_given), context))
    x0s, x_exits, sigmas, contexts = zip(*made, strict=True)
    return Rollout(torch.cat(x0s, 1), torch.cat(x_exits, 1), torch.cat(sigmas, 1), chunks, contexts)


def replay(student: Network, record: Rollout, conditioning: Conditioning) -> Tensor:
    """The rollout's x0 [B, F, C, H, W] with gradient: all exit steps in one packed pass.

    Equal to differentiating chunk by chunk, since context carries no gradient.
    """
    context = PackedContext(record.contexts, tuple(chunk.frames for chunk in record.chunks))
    flow = student(record.x_exit, record.sigma_exit, conditioning, context).flow
    return x0_from_flow(record.x_exit, flow, record.sigma_exit)
