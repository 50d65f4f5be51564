"""k-means against clusters that are known, and what a kill leaves of it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from in_processes import run_until_killed
from scipy.optimize import linear_sum_assignment

from selfforcing_dfd.common import UserError
from selfforcing_dfd.curate import cluster
from selfforcing_dfd.curate.cluster import ClusterSettings, cluster_clips
from selfforcing_dfd.curate.folder import ASSIGNMENT, CLUSTERS, Embedded, read_clusters
from selfforcing_dfd.curate.kmeans import KMeans, State
from selfforcing_dfd.rng import normal, uniform


def blobs(num_blobs: int, each: int, spread: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors around random directions, in random order, and where each belongs."""
    centres = torch.nn.functional.normalize(normal((num_blobs, 16), 0, "centres"), dim=1)
    labels = torch.arange(num_blobs).repeat(each)[
        uniform((num_blobs * each,), 0, "order").argsort()
    ]
    points = centres[labels] + spread * normal((len(labels), 16), 0, "points")
    return torch.nn.functional.normalize(points, dim=1).numpy(), labels.numpy()


def run(kmeans: KMeans, k: int, iterations: int, seed: int = 0) -> State:
    state = kmeans.start(k, seed)
    for _ in range(iterations):
        kmeans.step(state)
    return state


def test_blobs_are_found() -> None:
    """Catches centres that start in one blob, and labels of other rows."""
    points, labels = blobs(8, 40)
    kmeans = KMeans(points, np.arange(len(points)))
    state = run(kmeans, 8, 10)
    found = kmeans.assign(state.centres)
    table = np.zeros((8, 8))
    np.add.at(table, (labels, found.labels.numpy()), 1)
    rows, columns = linear_sum_assignment(-table)
    assert table[rows, columns].sum() == len(points)
    means = [points[found.labels.numpy() == n].mean(axis=0) for n in range(8)]
    np.testing.assert_allclose(state.centres, np.stack(means), atol=1e-6)
    distances = ((points - state.centres[found.labels].numpy()) ** 2).sum()
    assert found.objective == pytest.approx(distances, rel=1e-6)


def test_the_objective_never_rises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a step that is no step of Lloyd's, also where rows are read in pieces."""
    points = torch.nn.functional.normalize(normal((300, 16), 1, "points"), dim=1).numpy()
    rows = np.arange(0, 300, 2)
    whole = run(KMeans(points, rows), 12, 15)
    assert all(np.diff(whole.objectives) <= 1e-9)
    assert whole.objectives[-1] < 0.97 * whole.objectives[0]
    assert run(KMeans(points, rows), 12, 15).centres.equal(whole.centres)
    assert not run(KMeans(points, rows), 12, 15, seed=1).centres.equal(whole.centres)
    monkeypatch.setattr("selfforcing_dfd.curate.kmeans.CHUNK", 7)
    pieces = run(KMeans(points, rows), 12, 15)
    assert pieces.objectives == pytest.approx(whole.objectives)


def test_centres_without_rows_are_moved_and_counted() -> None:
    """Catches clusters that stay empty while others are wide, and an endless search for clips."""
    points, _ = blobs(3, 20)
    kmeans = KMeans(points, np.arange(len(points)))
    far = torch.full((1, 16), 9.0)
    state = State(torch.cat([torch.from_numpy(points[:3]), far, far]))
    kmeans.step(state)
    assert state.refilled == 2
    for _ in range(5):
        kmeans.step(state)
    assert all(np.diff(state.objectives) <= 1e-9)
    counts = torch.bincount(kmeans.assign(state.centres).labels, minlength=5)
    assert (counts > 0).all()
    same = KMeans(np.repeat(points[:2], 4, axis=0), np.arange(8))
    state = run(same, 5, 3)
    assert state.refilled == 0
    assert same.assign(state.centres).objective == 0


def cluster_until_killed(embedded: Embedded, settings: ClusterSettings, iterations: int) -> None:
    whole = cluster.store_state

    def dying(partial: Path, job: str, state: State) -> None:
        whole(partial, job, state)
        if len(state.objectives) == iterations:
            os.kill(os.getpid(), signal.SIGKILL)

    cluster.store_state = dying
    cluster_clips(embedded, settings, overwrite=True)


def test_a_killed_run_goes_on_after_its_last_iteration(curation: Embedded) -> None:
    """Catches iterations that are lost, and a result that depends on where the kill was."""
    folder = curation.folder
    before = {name: (folder / name).read_bytes() for name in (CLUSTERS, ASSIGNMENT)}
    settings = ClusterSettings(clusters=4)
    run_until_killed(cluster_until_killed, curation, settings, 2)
    with pytest.raises(UserError, match=r"has no clusters\.json"):
        read_clusters(curation)
    with pytest.raises(UserError, match="begun with other features or settings"):
        cluster_clips(curation, ClusterSettings(clusters=3))
    cluster_clips(curation, settings)
    assert {name: (folder / name).read_bytes() for name in before} == before
    with pytest.raises(UserError, match="holds clusters; replace them with --overwrite"):
        cluster_clips(curation, settings)


def test_clusters_say_what_they_are(curation: Embedded) -> None:
    """Catches sizes that do not add up, clips without features in a cluster, and mixed folders."""
    clusters = read_clusters(curation)
    assert sum(clusters.about["sizes"]) == 24
    assert clusters.labels[-1] == -1
    assert np.isnan(clusters.distances[-1])
    assert clusters.about["objectives"] == sorted(clusters.about["objectives"], reverse=True)
    members = clusters.members(0)
    assert (clusters.labels[members] == 0).all()
    assert (np.diff(clusters.distances[members]) >= 0).all()
    with pytest.raises(UserError, match="24 clips for 25 clusters; ask for fewer"):
        cluster_clips(curation, ClusterSettings(clusters=25), overwrite=True)
    cluster_clips(curation, ClusterSettings(clusters=3))
    (curation.folder / ASSIGNMENT).write_bytes(b"other")
    with pytest.raises(UserError, match="is gone or not as it was written"):
        read_clusters(curation)
