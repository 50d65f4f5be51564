"""Clips to be judged: what teacher and student show for the same captions, from the same noise.

Every source yields decoded videos in batches, so a row of a report is never in memory as a whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from selfforcing_dfd import rng
from selfforcing_dfd.context import (
    WHOLE_CLIP,
    Cache,
    ChunkKV,
    Conditioning,
    Context,
    KVCache,
    Network,
    NetworkOutput,
)
from selfforcing_dfd.flow import add_noise, expand_sigma
from selfforcing_dfd.models.picture import Picture, conditioning_of
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.ode import descend, sample, with_context
from selfforcing_dfd.rollout import Chunks, Ladder, commit_chunk, denoise_chunk

Videos = Iterator[Tensor]
"""Batches of videos [B, T, H, W, 3], float32 in [0, 1], in the order of the captions."""

Decode = Callable[[Tensor], Tensor]
"""Latents [B, F, C, H, W] -> videos [B, T, H, W, 3], float32 in [0, 1] on the CPU."""


GoOn = Callable[["EvaluationSet", Tensor, Decode], Videos]
"""Videos that begin with the first chunk of real clips, given as clean latents [N, F, C, H, W]."""


@dataclass(frozen=True, slots=True)
class EvaluationSet:
    """What every source is asked for: captions, their text [N, L, D_text], and noise by counter.

    Clip i is a function of the seed and i alone, so a larger set begins with the clips of a smaller
    one. latent_shape: [F, C, H, W] of one clip. seed: of noise, and of the captions where they are
    drawn. negative: [L, D_text], the text of no caption; zeros where it is None. batch: clips that
    are generated at once. given: clean latents [N, g, C, H, W] that the clips begin with; None for
    networks that make all frames. picture: of each clip, for networks of Wan2.1-I2V.
    """

    captions: tuple[str, ...]
    text: Tensor
    latent_shape: tuple[int, ...]
    seed: int
    negative: Tensor | None = None
    batch: int = 32
    given: Tensor | None = None
    picture: Picture | None = None

    def __len__(self) -> int:
        return len(self.captions)

    def first(self, num_clips: int) -> EvaluationSet:
        """The set of its first clips."""
        return dataclasses.replace(
            self,
            captions=self.captions[:num_clips],
            text=self.text[:num_clips],
            given=None if self.given is None else self.given[:num_clips],
            picture=None if self.picture is None else self.picture.rows(0, num_clips),
        )

    def batches(self, description: str) -> Iterator[range]:
        """Indices of the clips in batches, with a progress bar that counts clips."""
        with tqdm(total=len(self), desc=description, unit="clip", dynamic_ncols=True) as bar:
            for start in range(0, len(self), self.batch):
                part = range(start, min(start + self.batch, len(self)))
                yield part
                bar.update(len(part))

    def noise(self, part: range, num_draws: int = 1) -> Tensor:
        """Noise [num_draws, B, F, C, H, W] of these clips.

        The first draw, which clips start from, does not depend on num_draws.
        """
        draws = []
        for draw in range(num_draws):
            clips = [
                rng.normal(self.latent_shape, self.seed, "evaluation noise", clip, draw)
                for clip in part
            ]
            draws.append(torch.stack(clips))
        return torch.stack(draws)


class MakeChunk(Protocol):
    """How a causal network makes one chunk after its past."""

    @property
    def num_draws(self) -> int:
        """Draws of noise that a chunk takes."""
        ...

    @property
    def context_sigma(self) -> float:
        """The noise level at which later chunks see a finished one; 0: by a clean commit pass."""
        ...

    def __call__(
        self,
        network: WanTransformer,
        noise: Tensor,
        conditioning: Conditioning,
        context: Context,
        given: Tensor | None = None,
        remember: Cache | None = None,
    ) -> Tensor:
        """Clean latents [B, f, C, H, W] from noise [num_draws, B, f, C, H, W].

        given: clean latents [B, g, C, H, W] that the chunk begins with. remember: gets the last
        call's keys and values, where `context_sigma` is not 0.
        """
        ...


@dataclass(frozen=True, slots=True)
class FewSteps:
    """A student: down the whole ladder, as in streaming. Others: see `rollout.rollout`."""

    ladder: Ladder
    keeps_noise: bool = False
    first_ladder: Ladder | None = None
    commits: bool = True

    @property
    def num_draws(self) -> int:
        return 1 if self.keeps_noise else max(len(self.ladder), len(self.first_ladder or ()))

    @property
    def context_sigma(self) -> float:
        return 0.0 if self.commits else self.ladder[-1]

    def __call__(
        self,
        network: Network,
        noise: Tensor,
        conditioning: Conditioning,
        context: Context,
        given: Tensor | None = None,
        remember: Cache | None = None,
    ) -> Tensor:
        ladder = self.ladder
        if self.first_ladder is not None and context.next_frame == 0:
            ladder = self.first_ladder
        return denoise_chunk(
            network, noise, conditioning, context, ladder, given=given, remember=remember
        )[0]


@dataclass(frozen=True, slots=True)
class ODESteps:
    """A causal teacher, unguided: its ODE by Heun's method, 2 num_steps - 1 network calls."""

    num_steps: int
    shift: float
    num_draws = 1
    context_sigma = 0.0

    def __call__(
        self,
        network: WanTransformer,
        noise: Tensor,
        conditioning: Conditioning,
        context: Context,
        given: Tensor | None = None,
        remember: Cache | None = None,
    ) -> Tensor:
        own = with_context(network, context)
        return sample(own, noise[0], conditioning, self.num_steps, self.shift, given=given)


@dataclass(frozen=True, slots=True)
class ODEAtEachStep:
    """What a student would be that has learnt a causal teacher's trajectories without error.

    At each step of few_steps the answer is where the teacher's ODE leads, in num_steps steps of
    Heun's method. What is lost here no training can bring back.
    """

    few_steps: FewSteps
    num_steps: int
    shift: float
    context_sigma = 0.0

    @property
    def num_draws(self) -> int:
        return self.few_steps.num_draws

    def __call__(
        self,
        network: WanTransformer,
        noise: Tensor,
        conditioning: Conditioning,
        context: Context,
        given: Tensor | None = None,
        remember: Cache | None = None,
    ) -> Tensor:
        return self.few_steps(self.student(network), noise, conditioning, context, given)

    def student(self, teacher: Network) -> Network:
        """The network whose clean prediction is where the teacher's ODE leads."""

        def run(
            x_t: Tensor,
            sigma: Tensor | float,
            conditioning: Conditioning,
            context: Context | None = None,
        ) -> NetworkOutput:
            level = torch.as_tensor(sigma).to(x_t).expand(x_t.shape[:2])
            seen = WHOLE_CLIP if context is None else context
            x0 = descend(teacher, x_t, level, conditioning, seen, self.num_steps, self.shift)
            way = level.clamp_min(torch.finfo(level.dtype).tiny)  # given frames are at sigma 0
            return NetworkOutput((x_t - x0) / expand_sigma(way, x_t), ChunkKV(x_t.shape[1], ()))

        return run


@torch.no_grad()
def make_clip(
    network: WanTransformer,
    make_chunk: MakeChunk,
    noise: Tensor,
    conditioning: Conditioning,
    cache: Cache,
    chunks: Chunks,
    begun: Tensor | None = None,
    given: Tensor | None = None,
) -> Tensor:
    """Clean latents [B, F, C, H, W], chunk by chunk; each chunk sees those before it.

    noise: [num_draws, B, F, C, H, W]. begun: clean latents [B, f, C, H, W] of the first chunks,
    which are remembered as if they had been made here. given: those that the first chunk begins
    with, where it is made.
    """
    num_begun = 0 if begun is None else begun.shape[1]
    made = []
    for chunk in chunks:
        is_begun = begun is not None and chunk.start < num_begun
        is_last = chunk is chunks[-1]
        sigma = make_chunk.context_sigma
        draws = chunk.of(noise, 2)
        if begun is not None and is_begun:
            x0 = chunk.of(begun)
        else:
            context = cache.read(chunk.frames)
            own = given if chunk is chunks[0] else None
            kept = cache if sigma and not is_last else None
            x0 = make_chunk(network, draws, conditioning, context, own, kept)
        if not is_last and (is_begun or not sigma):
            past = add_noise(x0, draws[-1], sigma) if sigma else x0
            commit_chunk(network, past, conditioning, cache, sigma)
        made.append(x0)
    return torch.cat(made, dim=1)


def causal_clips(
    network: WanTransformer,
    evaluation: EvaluationSet,
    decode: Decode,
    *,
    make_chunk: MakeChunk,
    chunks: Chunks,
    sink: int = 0,
    window: int | None = None,
    begun: Tensor | None = None,
    description: str = "causal",
) -> Videos:
    """Clips of a causal network after its own past, as in streaming.

    make_chunk: `FewSteps` for a student, `ODESteps` for a causal teacher. begun: clean latents
    [N, f, C, H, W] that each clip begins with, whole chunks.
    """
    for part in evaluation.batches(description):
        noise, conditioning = _inputs(network, evaluation, part, make_chunk.num_draws)
        own = None if begun is None else begun[part.start : part.stop].to(noise)
        cache = KVCache(sink, window)
        given = given_of(evaluation, part, noise)
        latents = make_clip(network, make_chunk, noise, conditioning, cache, chunks, own, given)
        yield decode(latents)


def teacher_clips(
    teacher: WanTransformer,
    evaluation: EvaluationSet,
    decode: Decode,
    *,
    num_steps: int,
    shift: float,
    guidance: float = 1.0,
    description: str = "teacher",
) -> Videos:
    """Many-step ODE samples of a bidirectional network; about 2 num_steps network calls a batch."""
    for part in evaluation.batches(description):
        noise, conditioning = _inputs(teacher, evaluation, part, 1)
        negative = None
        if evaluation.negative is not None:
            text = evaluation.negative.to(conditioning.text)
            negative = Conditioning(text.expand_as(conditioning.text))
        given = given_of(evaluation, part, noise)
        clips = sample(teacher, noise[0], conditioning, num_steps, shift, guidance, negative, given)
        yield decode(clips)


def given_of(evaluation: EvaluationSet, part: range, like: Tensor) -> Tensor | None:
    """What these clips begin with, on the device of `like`."""
    given = evaluation.given
    return None if given is None else given[part.start : part.stop].to(like)


def _inputs(
    network: WanTransformer, evaluation: EvaluationSet, part: range, num_draws: int
) -> tuple[Tensor, Conditioning]:
    weight = next(network.parameters())
    text = evaluation.text[part.start : part.stop]
    noise = evaluation.noise(part, num_draws).to(weight.device)  # float32, as in streaming
    picture = evaluation.picture
    if picture is not None:
        picture = picture.rows(part.start, part.stop).to(weight.device)
    return noise, conditioning_of(text.to(weight), picture)
