"""How unlike the videos of one prompt are: Eq. 26 of the DFD paper (arXiv 2606.18478)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from selfforcing_dfd.metrics.features import pooled, unit
from selfforcing_dfd.tiny.bootstrap import Resamples, Score


def diversity(vectors: Tensor) -> Tensor:
    """1 - the mean cosine of all pairs i < j, of [L, D] or, place by place, of [L, K, D].

    Unbiased for any number L >= 2 of videos. With places it is the mean over places: the paper's
    "per-frame", which compares frames of the same time. ValueError for fewer than two videos.
    """
    if len(vectors) < 2:
        raise ValueError(f"{len(vectors)} video; a diversity needs two of the same prompt")
    places = unit(vectors.double()).reshape(len(vectors), -1, vectors.shape[-1])
    cosines = torch.einsum("ikd,jkd->ij", places, places) / places.shape[1]
    pairs = torch.triu_indices(len(vectors), len(vectors), offset=1)
    return 1 - cosines[pairs[0], pairs[1]].mean()


def by_prompt(prompts: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    """The videos of each prompt that has at least two, by number."""
    found: dict[Hashable, list[int]] = {}
    for number, prompt in enumerate(prompts):
        found.setdefault(prompt, []).append(number)
    return {prompt: numbers for prompt, numbers in found.items() if len(numbers) > 1}


def diversity_scores(
    frames: Tensor, prompts: Sequence[Hashable], seed: int = 0
) -> dict[str, Score]:
    """`diversity_mean` of pooled and `diversity_frames` of time-aligned features [N, K, D].

    Means over prompts. The intervals resample prompts, never pairs of videos, which hang together.
    Empty where no prompt has two videos.
    """
    groups = by_prompt(prompts).values()
    if not groups:
        return {}
    clips = pooled(frames)
    every = Resamples.draw(len(groups), seed)
    found = {
        "diversity_mean": [diversity(clips[numbers]) for numbers in groups],
        "diversity_frames": [diversity(frames[numbers]) for numbers in groups],
    }
    return {name: every.score(every.mean(torch.stack(found[name]))) for name in found}
