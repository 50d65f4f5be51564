"""The follow test of a causal network: real first chunks of held-out clips, and how it goes on."""

from __future__ import annotations

import torch
from torch import Tensor

from selfforcing_dfd.evaluation.generate import (
    Decode,
    EvaluationSet,
    MakeChunk,
    Videos,
    causal_clips,
)
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.rollout import Chunks
from selfforcing_dfd.tiny.bootstrap import Score
from selfforcing_dfd.tiny.follow import compare_with_real
from selfforcing_dfd.tiny.readout import Reading, read


def follow_scores(
    network: WanTransformer,
    evaluation: EvaluationSet,
    real: Tensor,
    decode: Decode,
    *,
    make_chunk: MakeChunk,
    chunks: Chunks,
    sink: int = 0,
    window: int | None = None,
) -> dict[str, Score]:
    """The scores of `tiny.follow.compare_with_real` for a student or a causal teacher.

    real: clean latents [N, F, C, H, W] of held-out clips with the captions of `evaluation`; the
    first chunk of each is given. make_chunk: `FewSteps(ladder)` for a student, `ODESteps(...)` for
    a causal teacher. chunks: of one clip, all of one size.
    """
    videos = causal_clips(
        network,
        evaluation,
        decode,
        make_chunk=make_chunk,
        chunks=chunks,
        sink=sink,
        window=window,
        begun=chunks[0].of(real),
        description="follow",
    )
    return compare_clips(videos, real, decode, chunks[0].frames)


def compare_clips(
    videos: Videos, real: Tensor, decode: Decode, chunk_frames: int
) -> dict[str, Score]:
    """The same for videos that begin with the first chunk of `real` [N, F, C, H, W]."""
    generated = Reading.join([read(batch, chunk_frames) for batch in videos])
    true = [read(decode(part), chunk_frames) for part in torch.split(real, 32)]
    return compare_with_real(generated, Reading.join(true))
