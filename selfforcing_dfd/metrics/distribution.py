"""Two sets of clips compared by their features, [N, D] and [M, D].

Precision, recall (Kynkaanniemi 2019), density, coverage (Naeem 2020), Vendi score (Friedman 2022),
MMD (Gretton 2012), and nearest training clips. Distances are Euclidean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from selfforcing_dfd.rng import generator
from selfforcing_dfd.tiny.bootstrap import Resamples, Score

NEAREST_MANIFOLD = 3  # neighbours that make the radius of precision and recall
NEAREST_DENSITY = 5  # of density and coverage
COPY_SHARE = 0.01  # of held-out clips come as near to a training clip as what is called a copy
TINY = 1e-12


def radii(vectors: Tensor, nearest: int) -> Tensor:
    """[N]: distance of each vector to its `nearest`-th neighbour among the others.

    ValueError for sets without so many neighbours.
    """
    if len(vectors) <= nearest:
        raise ValueError(f"{len(vectors)} clips; want at least {nearest + 1} on each side")
    return distances(vectors, vectors).fill_diagonal_(0).kthvalue(nearest + 1, dim=1).values


def distances(one: Tensor, other: Tensor) -> Tensor:
    """[N, M], without the shortcut by products, which is blind to copies."""
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cdist(one.double(), other.double(), compute_mode=exact)


def precision_and_recall(generated: Tensor, reference: Tensor, seed: int = 0) -> dict[str, Score]:
    """Shares of each set inside the other's balls, whose radius is the third neighbour's distance.

    Precision counts generated clips that look real, recall real clips that could be generated.
    """
    between = distances(generated, reference)
    inside = between <= radii(reference, NEAREST_MANIFOLD)
    reached = between <= radii(generated, NEAREST_MANIFOLD)[:, None]
    return {"precision": share(inside.any(dim=1), seed), "recall": share(reached.any(dim=0), seed)}


def density_and_coverage(generated: Tensor, reference: Tensor, seed: int = 0) -> dict[str, Score]:
    """How many real balls a generated clip lies in, and the share of real balls that hold one.

    Balls reach to the fifth neighbour; a density of 1 is that of the data.
    """
    inside = distances(generated, reference) <= radii(reference, NEAREST_DENSITY)
    return {
        "density": share(inside.double().sum(dim=1) / NEAREST_DENSITY, seed),
        "coverage": share(inside.any(dim=0), seed),
    }


def share(values: Tensor, seed: int) -> Score:
    """The mean of values [n], with a bootstrap interval over clips."""
    every = Resamples.draw(len(values), seed)
    return every.score(every.mean(values), 0)


def vendi(vectors: Tensor) -> float:
    """The number of clips that are as good as different: exp of the entropy of their likeness.

    vectors: unit vectors [N, D], compared by cosine. 1 for copies, N for orthogonal vectors.
    """
    kernel = vectors.double() @ vectors.double().T / len(vectors)
    values = torch.linalg.eigvalsh(kernel)
    values = values[values > TINY]
    return float(torch.exp(-(values * values.log()).sum()))


def mmd(generated: Tensor, reference: Tensor, bandwidth: float | None = None) -> float:
    """Squared maximum mean discrepancy, unbiased: 0 on average for two sets of one law.

    The kernel is exp(-d^2 / (2 bandwidth^2)). bandwidth: by default the median distance of the
    reference's pairs.
    """
    within = distances(reference, reference)
    if bandwidth is None:
        pairs = torch.triu_indices(len(reference), len(reference), offset=1)
        bandwidth = float(within[pairs[0], pairs[1]].median())

    def kernel(distance: Tensor) -> Tensor:
        return torch.exp(-distance.square() / (2 * max(bandwidth, TINY) ** 2))

    return float(
        off_diagonal_mean(kernel(distances(generated, generated)))
        + off_diagonal_mean(kernel(within))
        - 2 * kernel(distances(generated, reference)).mean()
    )


def off_diagonal_mean(square: Tensor) -> Tensor:
    n = len(square)
    return (square.sum() - square.trace()) / (n * (n - 1))


@dataclass(frozen=True, slots=True)
class Memory:
    """What speaks for training clips being repeated.

    nearer: share of videos that lie nearer to a training clip than to any of as many held-out
    clips; .5 where nothing was learned by heart. copies: share nearer to a training clip than all
    but 1 % of held-out clips are. ratio: of the median distances to training and to held-out clips;
    1 where nothing was learned by heart. nearest: training clip of each video, by number. distance:
    to it.
    """

    nearer: Score
    copies: Score
    ratio: float
    nearest: list[int]
    distance: list[float]

    def scores(self) -> dict[str, Score | float]:
        return {
            "memory_nearer": self.nearer,
            "memory_copies": self.copies,
            "memory_ratio": self.ratio,
        }


def memorisation(generated: Tensor, training: Tensor, held_out: Tensor, seed: int = 0) -> Memory:
    """Compare the nearest training clip of each generated clip with its nearest held-out clip.

    Both sets are thinned to equal numbers at random, since a larger set has nearer clips; copies
    are looked for among all training clips. Held-out clips must be of the same source.
    ValueError for an empty set.
    """
    if not len(training) or not len(held_out):
        raise ValueError("memorisation wants training clips and held-out clips; one set is empty")
    to_training = distances(generated, training)
    count = min(len(training), len(held_out))
    some = to_training[:, picks(len(training), count, seed)].amin(dim=1)
    others = distances(generated, held_out)[:, picks(len(held_out), count, seed + 1)].amin(dim=1)
    usual = distances(held_out, training).amin(dim=1)
    closest = to_training.min(dim=1)
    threshold = usual.quantile(COPY_SHARE)
    return Memory(
        nearer=share((some < others).double() + 0.5 * (some == others), seed),
        copies=share(closest.values < threshold, seed),
        ratio=ratio(float(some.median()), float(others.median())),
        nearest=closest.indices.tolist(),
        distance=closest.values.tolist(),
    )


def ratio(value: float, by: float) -> float:
    return value / by if by > TINY else math.nan


def picks(count: int, wanted: int, seed: int) -> Tensor:
    """Numbers of `wanted` of `count` items, at random."""
    return torch.randperm(count, generator=generator(seed, "thinned"))[:wanted]
