"""Clips to be judged: what data, teacher and student show for the same captions, from the same
noise.

Every source yields decoded videos in batches, so that no row of a report is ever in memory as a
whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from tqdm import tqdm

from selfforcing_dfd import rng
from selfforcing_dfd.context import Conditioning, KVCache
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.ode import sample
from selfforcing_dfd.rollout import Chunk, rollout
from selfforcing_dfd.tiny.codec import CHANNELS, SPACE, TIME, TinyCodec
from selfforcing_dfd.tiny.text import TinyText
from selfforcing_dfd.tiny.world import SIDE, Factors, Level, captions, draw_factors, render

EVALUATION_SEED = 1000  # the same for every training seed, so that reports compare clip by clip
BATCH = 32

Videos = Iterator[Tensor]
"""Batches of videos [B, T, 64, 64, 3], float32 in [0, 1], in the order of the evaluation set's
captions.
"""


@dataclass(frozen=True, slots=True)
class EvaluationSet:
    """What every source is asked for: captions with their text [N, L, D_text], and noise by
    counter.

    Clip i is a function of i alone, so a larger set begins with the clips of a smaller one.
    """

    captions: tuple[str, ...]
    text: Tensor
    num_latent_frames: int

    @classmethod
    def draw(
        cls, num_clips: int, level: Level, num_latent_frames: int, text_dim: int
    ) -> EvaluationSet:
        """Captions of `num_clips` draws from the data law; `data_clips` renders the same draws."""
        return cls.of_captions(
            captions(evaluation_factors(num_clips), level), num_latent_frames, text_dim
        )

    @classmethod
    def of_captions(
        cls, asked: Iterable[str], num_latent_frames: int, text_dim: int
    ) -> EvaluationSet:
        """Any captions. Raises ValueError for one that is longer than the text encoder takes."""
        words = tuple(asked)
        return cls(words, TinyText(text_dim).encode(list(words)), num_latent_frames)

    def __len__(self) -> int:
        return len(self.captions)

    def batches(self, description: str) -> Iterator[range]:
        """Indices of the clips in batches, with a progress bar that counts clips."""
        with tqdm(total=len(self), desc=description, unit="clip", dynamic_ncols=True) as bar:
            for start in range(0, len(self), BATCH):
                part = range(start, min(start + BATCH, len(self)))
                yield part
                bar.update(len(part))

    def noise(self, part: range, num_draws: int = 1) -> Tensor:
        """Noise [num_draws, B, F, C, H, W] of these clips. The first draw, the start, does not
        depend on num_draws.
        """
        shape = (self.num_latent_frames, CHANNELS, SIDE // SPACE, SIDE // SPACE)
        draws = range(num_draws)
        return torch.stack(
            [
                torch.stack(
                    [rng.normal(shape, EVALUATION_SEED, "evaluation noise", i, d) for i in part]
                )
                for d in draws
            ]
        )


def evaluation_factors(num_clips: int) -> Factors:
    """The factors behind the evaluation set: each clip its own draw from the data law."""
    drawn = [
        draw_factors(1, rng.generator(EVALUATION_SEED, "evaluation clip", clip))
        for clip in range(num_clips)
    ]
    return Factors(
        *(
            torch.cat([getattr(factors, field.name) for factors in drawn])
            for field in fields(Factors)
        )
    )


def data_clips(evaluation: EvaluationSet, codec: TinyCodec, description: str = "data") -> Videos:
    """The clips that a drawn set's captions were taken from, once through the codec: what every row
    is held against.
    """
    factors = evaluation_factors(len(evaluation))
    num_frames = 1 + TIME * (evaluation.num_latent_frames - 1)
    for part in evaluation.batches(description):
        yield decoded(
            codec.encode(render(factors[slice(part.start, part.stop)], num_frames)), codec
        )


def student_clips(
    student: WanTransformer,
    evaluation: EvaluationSet,
    codec: TinyCodec,
    *,
    ladder: tuple[float, ...],
    chunks: tuple[Chunk, ...],
    sink: int = 0,
    window: int | None = None,
    description: str = "student",
) -> Videos:
    """Rollouts down the whole ladder, the student's own chunks as context: what streaming would
    show.
    """
    for part in evaluation.batches(description):
        noise, conditioning = _inputs(student, evaluation, part, len(ladder))
        yield decoded(
            rollout(student, noise, conditioning, KVCache(sink, window), ladder, chunks).x0, codec
        )


def teacher_clips(
    teacher: WanTransformer,
    evaluation: EvaluationSet,
    codec: TinyCodec,
    *,
    num_steps: int,
    shift: float,
    guidance: float = 1.0,
    description: str = "teacher",
) -> Videos:
    """Many-step ODE samples of a bidirectional network; about 2 num_steps network calls a batch."""
    for part in evaluation.batches(description):
        noise, conditioning = _inputs(teacher, evaluation, part, 1)
        yield decoded(sample(teacher, noise[0], conditioning, num_steps, shift, guidance), codec)


def decoded(latents: Tensor, codec: TinyCodec) -> Tensor:
    """Videos [B, T, H, W, 3] in [0, 1] on the CPU, as a screen would show latents [B, F, C, H, W]."""
    return codec.decode(latents.float().cpu()).clamp(0, 1)


def _inputs(
    network: WanTransformer, evaluation: EvaluationSet, part: range, num_draws: int
) -> tuple[Tensor, Conditioning]:
    weight = next(network.parameters())
    text = evaluation.text[part.start : part.stop]
    return evaluation.noise(part, num_draws).to(weight), Conditioning(text.to(weight))
