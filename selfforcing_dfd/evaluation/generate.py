"""Clips to be judged: what teacher and student show for the same captions, from the same noise.

Every source yields decoded videos in batches, so a row of a report is never in memory as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from selfforcing_dfd import rng
from selfforcing_dfd.context import Conditioning, KVCache
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.ode import sample
from selfforcing_dfd.rollout import Chunk, rollout

EVALUATION_SEED = 1000  # the same for every training seed, so that reports compare clip by clip

Videos = Iterator[Tensor]
"""Batches of videos [B, T, H, W, 3], float32 in [0, 1], in the order of the captions."""

Decode = Callable[[Tensor], Tensor]
"""Latents [B, F, C, H, W] -> videos [B, T, H, W, 3], float32 in [0, 1] on the CPU."""


@dataclass(frozen=True, slots=True)
class EvaluationSet:
    """What every source is asked for: captions, their text [N, L, D_text], and noise by counter.

    Clip i is a function of i alone, so a larger set begins with the clips of a smaller one.
    latent_shape: [F, C, H, W] of one clip. negative: [L, D_text], the text of no caption; zeros
    where it is None. batch: clips that are generated at once.
    """

    captions: tuple[str, ...]
    text: Tensor
    latent_shape: tuple[int, ...]
    negative: Tensor | None = None
    batch: int = 32

    def __len__(self) -> int:
        return len(self.captions)

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
                rng.normal(self.latent_shape, EVALUATION_SEED, "evaluation noise", clip, draw)
                for clip in part
            ]
            draws.append(torch.stack(clips))
        return torch.stack(draws)


def student_clips(
    student: WanTransformer,
    evaluation: EvaluationSet,
    decode: Decode,
    *,
    ladder: tuple[float, ...],
    chunks: tuple[Chunk, ...],
    sink: int = 0,
    window: int | None = None,
    description: str = "student",
) -> Videos:
    """Rollouts down the whole ladder with the student's own chunks as context, as in streaming."""
    for part in evaluation.batches(description):
        noise, conditioning = _inputs(student, evaluation, part, len(ladder))
        cache = KVCache(sink, window)
        yield decode(rollout(student, noise, conditioning, cache, ladder, chunks).x0)


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
        yield decode(sample(teacher, noise[0], conditioning, num_steps, shift, guidance, negative))


def _inputs(
    network: WanTransformer, evaluation: EvaluationSet, part: range, num_draws: int
) -> tuple[Tensor, Conditioning]:
    weight = next(network.parameters())
    text = evaluation.text[part.start : part.stop]
    noise = evaluation.noise(part, num_draws).to(weight.device)  # float32, as in streaming
    return noise, Conditioning(text.to(weight))
