"""k-means (Lloyd's algorithm) on rows of a large array: squared distances, means as centres.

k-means++ draws the first centres, from at most SAMPLED rows for each centre. A centre that no row
is nearest to moves to the row that is farthest from its own centre. On one machine the same rows,
seed and number of threads give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from selfforcing_dfd import rng
from selfforcing_dfd.common import UserError

CHUNK = 16384  # rows that are in memory at once
SAMPLED = 64  # rows for each centre, of which the first centres are drawn


@dataclass(frozen=True, slots=True)
class Assignment:
    """labels: the nearest centre of each row, [N] int64. squares: of the distances, [N] float64."""

    labels: Tensor
    squares: Tensor

    @property
    def objective(self) -> float:
        return float(self.squares.sum())


@dataclass(slots=True)
class State:
    """Where a run stands, after each iteration.

    centres: [k, D] float32. objectives: sums of squared distances before each iteration. refilled:
    how many centres without rows were moved so far.
    """

    centres: Tensor
    objectives: list[float] = field(default_factory=list)
    refilled: int = 0

    @property
    def converged(self) -> bool:
        """The last two iterations found the same sum: nothing moves any more."""
        return len(self.objectives) > 1 and self.objectives[-1] == self.objectives[-2]


@dataclass(frozen=True, slots=True)
class KMeans:
    """The rows of `features` [N, D] that are named, in k clusters.

    device: where distances are computed.
    """

    features: np.ndarray
    rows: np.ndarray
    device: torch.device | str = "cpu"

    def start(self, k: int, seed: int) -> State:
        """The first centres, by k-means++. UserError for fewer rows than centres."""
        if len(self.rows) < k:
            raise UserError(
                f"{len(self.rows)} clips for {k} clusters; ask for fewer, such as --clusters "
                f"{max(len(self.rows) // 20, 1)}"
            )
        return State(self._spread(k, seed))

    def step(self, state: State) -> None:
        """One iteration: rows to their nearest centres, centres to the means of their rows."""
        found = self.assign(state.centres)
        state.objectives.append(found.objective)
        k = len(state.centres)
        state.refilled += refill(found, k)
        sums = torch.zeros(k, self.features.shape[1], dtype=torch.float64)
        for first, chunk in self._chunks():
            labels = found.labels[first : first + len(chunk)]
            sums.index_add_(0, labels, chunk.double())
        counts = torch.bincount(found.labels, minlength=k)
        means = (sums / counts.clamp_min(1)[:, None]).float()
        state.centres = torch.where(counts[:, None] > 0, means, state.centres)

    def assign(self, centres: Tensor) -> Assignment:
        """The nearest centre of each row; of two as near the first."""
        on_device = centres.to(self.device)
        lengths = on_device.square().sum(dim=1)
        labels = torch.empty(len(self.rows), dtype=torch.int64)
        squares = torch.empty(len(self.rows), dtype=torch.float64)
        for first, chunk in self._chunks():
            here = slice(first, first + len(chunk))
            nearest = (lengths - 2 * chunk.to(self.device) @ on_device.T).argmin(dim=1).cpu()
            labels[here] = nearest
            squares[here] = (chunk.double() - centres[nearest].double()).square().sum(dim=1)
        return Assignment(labels, squares)

    def _chunks(self) -> Iterator[tuple[int, Tensor]]:
        """The place of the first row of each chunk, and its rows."""
        for first in range(0, len(self.rows), CHUNK):
            yield first, torch.from_numpy(self.features[self.rows[first : first + CHUNK]])

    def _spread(self, k: int, seed: int) -> Tensor:
        """k rows; each is drawn with probability as its squared distance to those before it."""
        order = torch.randperm(len(self.rows), generator=rng.generator(seed, "k-means sample"))
        some = self.rows[order[: k * SAMPLED].sort().values.numpy()]
        points = torch.from_numpy(self.features[some]).to(self.device)
        lengths = points.square().sum(dim=1)
        draws = rng.uniform((k,), seed, "k-means start")
        chosen = [int(draws[0] * len(points))]
        squares = torch.full_like(lengths, torch.inf)
        for draw in draws[1:]:
            newest = chosen[-1]
            products = points @ points[newest]
            found = lengths + lengths[newest] - 2 * products
            squares = squares.minimum(found.clamp_min(0))
            reached = squares.double().cpu().cumsum(0)
            place = int(torch.searchsorted(reached, draw * reached[-1], right=True))
            chosen.append(min(place, len(points) - 1))
        return points[chosen].cpu()


def refill(found: Assignment, k: int) -> int:
    """Give each centre without rows the row that is farthest from its own; how many got one.

    A row that is its cluster's only one, or that lies on its centre, stays where it is.
    """
    counts = torch.bincount(found.labels, minlength=k)
    empty = (counts == 0).nonzero().flatten().tolist()
    if not empty:
        return 0
    moved = 0
    for row in torch.argsort(found.squares, descending=True, stable=True).tolist():
        label = int(found.labels[row])
        if moved == len(empty) or found.squares[row] == 0:
            break
        if counts[label] > 1:
            counts[label] -= 1
            found.labels[row] = empty[moved]
            moved += 1
    return moved
