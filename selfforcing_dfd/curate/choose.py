"""From picks to a set of a wanted size: each pick brings the clips of its cluster most like it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from selfforcing_dfd.common import UserError
from selfforcing_dfd.curate.folder import Clusters, Embedded
from selfforcing_dfd.curate.picks import Sheet

CHUNK = 65536  # rows of features that are in memory at once


@dataclass(frozen=True, slots=True)
class Chosen:
    """A clip of the set. pick: number of the candidate that it is, or that it was taken for."""

    row: int
    clip: str
    cluster: int
    pick: int
    picked: bool


@dataclass(slots=True)
class _Pick:
    """A pick with the clips of its cluster, the most alike first, of which `next` is not seen."""

    number: int
    order: np.ndarray
    next: int = 0


@dataclass(slots=True)
class _Cluster:
    """A cluster from which clips are taken.

    rows: of its clips. vectors: their features. nearest: of each the greatest cosine with a clip
    that was taken. free: those that may be taken.
    """

    number: int
    rows: np.ndarray
    vectors: np.ndarray
    nearest: np.ndarray
    free: np.ndarray
    picks: list[_Pick] = field(default_factory=list)

    def take(self, place: int) -> int:
        self.free[place] = False
        self.nearest = np.maximum(self.nearest, self.vectors @ self.vectors[place])
        return int(self.rows[place])

    def most_alike(self, pick: _Pick, duplicate: float) -> int | None:
        """The place of the next clip for a pick; None where all are taken or duplicates."""
        while pick.next < len(pick.order):
            place = int(pick.order[pick.next])
            pick.next += 1
            if self.free[place] and self.nearest[place] <= duplicate:
                return place
        return None


@dataclass(frozen=True, slots=True)
class Limits:
    """quota: clips of the set; 0 is the picks alone. duplicate: clips whose cosine with one that
    was taken is above it are passed over. excluded: rows that are never taken, picks or not.
    """

    quota: int = 0
    duplicate: float = 0.98
    excluded: Collection[int] = ()


def choose(
    embedded: Embedded,
    clusters: Clusters,
    sheets: Sequence[Sheet],
    picks: Mapping[int, Sequence[int]],
    limits: Limits,
) -> list[Chosen]:
    """The set, in the order of clusters; a function of its arguments alone.

    All picks are in it. In turns, each pick then brings the clip of its cluster that is most like
    it, until the quota is met.

    UserError for more picks than the quota, and where the clusters hold too few clips.
    """
    opened = []
    chosen = []
    for sheet in sheets:
        numbers = picks.get(sheet.cluster, ())
        numbers = [n for n in numbers if sheet.candidates[n].row not in limits.excluded]
        if numbers:
            cluster = open_cluster(embedded, clusters, sheet.cluster, limits.excluded)
            chosen += [take_pick(embedded, cluster, sheet, number) for number in numbers]
            opened.append(cluster)
    if limits.quota and len(chosen) > limits.quota:
        raise UserError(
            f"the picks are {len(chosen)} clips and --quota is {limits.quota}; pick fewer, or ask "
            "for more"
        )
    fill(embedded, opened, chosen, limits)
    return sorted(chosen, key=lambda one: one.cluster)


def fill(
    embedded: Embedded, opened: Sequence[_Cluster], chosen: list[Chosen], limits: Limits
) -> None:
    """Add clips to `chosen`, until there are as many as the quota says."""
    turns = [(cluster, pick) for cluster in opened for pick in cluster.picks]
    while chosen and len(chosen) < limits.quota:
        before = len(chosen)
        for cluster, pick in turns:
            if len(chosen) == limits.quota:
                break
            place = cluster.most_alike(pick, limits.duplicate)
            if place is not None:
                row = cluster.take(place)
                name = embedded.names[row]
                chosen.append(Chosen(row, name, cluster.number, pick.number, picked=False))
        if len(chosen) == before:
            raise UserError(
                f"--quota is {limits.quota} and the picked clusters hold {before} clips that may "
                "be taken; pick in more clusters, raise --duplicate, or lower --quota"
            )


def open_cluster(
    embedded: Embedded, clusters: Clusters, number: int, excluded: Collection[int]
) -> _Cluster:
    rows = clusters.members(number)
    vectors = np.asarray(embedded.features[rows])
    free = np.array([int(row) not in excluded for row in rows])
    return _Cluster(number, rows, vectors, np.full(len(rows), -1.0, np.float32), free)


def take_pick(embedded: Embedded, cluster: _Cluster, sheet: Sheet, number: int) -> Chosen:
    """Take a pick itself, and note which clips are most like it."""
    row = sheet.candidates[number].row
    (places,) = np.nonzero(cluster.rows == row)
    place = int(places[0])
    alike = cluster.vectors @ cluster.vectors[place]
    cluster.picks.append(_Pick(number, np.argsort(-alike, kind="stable")))
    cluster.take(place)
    return Chosen(row, embedded.names[row], cluster.number, number, picked=True)


def rows_like(embedded: Embedded, rows: Sequence[int], least: float) -> set[int]:
    """Rows whose cosine with one of `rows` is at least `least`, and these rows."""
    found = set(rows)
    if not rows:
        return found
    wanted = np.asarray(embedded.features[list(rows)])
    for first in range(0, len(embedded.names), CHUNK):
        cosines = np.asarray(embedded.features[first : first + CHUNK]) @ wanted.T
        near = np.flatnonzero(cosines.max(axis=1) >= least)
        found.update((near + first).tolist())
    return found
