"""The clips of a curation folder in clusters, by k-means on their features."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from selfforcing_dfd.common import UserError, atomic_file, sha256_of
from selfforcing_dfd.config import MILLION, ranged
from selfforcing_dfd.curate.folder import (
    ASSIGNMENT,
    CLUSTERS,
    Clusters,
    Embedded,
    read_clusters,
    write_json,
)
from selfforcing_dfd.curate.kmeans import KMeans, State


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """clusters: how many. iterations: at most. seed: of the first centres."""

    clusters: int = ranged(1000, 1, MILLION)
    iterations: int = ranged(50, 0, 10_000)
    seed: int = ranged(0, 0, 2**63 - 1)


def cluster_clips(
    embedded: Embedded,
    settings: ClusterSettings,
    *,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
) -> Clusters:
    """Write the cluster of each clip into the curation folder.

    After a kill the same call goes on after the last whole iteration. Raises UserError for a folder
    with clusters, and for fewer clips than clusters.
    """
    folder = embedded.folder
    partial = folder / f"{ASSIGNMENT}.partial"
    if overwrite:
        for path in (folder / CLUSTERS, partial):
            path.unlink(missing_ok=True)
    elif (folder / CLUSTERS).exists():
        raise UserError(f"{folder} holds clusters; replace them with --overwrite")
    kmeans = KMeans(embedded.features, embedded.usable, device)
    job = f"{embedded.seal} {settings.clusters} {settings.seed}"
    state = iterate(kmeans, settings, partial, job)
    write_clusters(embedded, settings, kmeans, state)
    partial.unlink(missing_ok=True)
    return read_clusters(embedded)


def iterate(kmeans: KMeans, settings: ClusterSettings, partial: Path, job: str) -> State:
    """All iterations. The state after each is on disk, in `partial`."""
    state = stored_state(partial, job) or kmeans.start(settings.clusters, settings.seed)
    done = len(state.objectives)
    with tqdm(total=settings.iterations, initial=done, desc="k-means", disable=None) as bar:
        while len(state.objectives) < settings.iterations and not state.converged:
            kmeans.step(state)
            store_state(partial, job, state)
            bar.set_postfix(objective=f"{state.objectives[-1]:.6g}")
            bar.update()
    return state


def stored_state(partial: Path, job: str) -> State | None:
    """Where a killed run of the same job was."""
    if not partial.is_file():
        return None
    stored = load_file(partial)
    if bytes(stored["job"].numpy()).decode() != job:
        raise UserError(
            f"{partial} was begun with other features or settings; start again with --overwrite"
        )
    return State(stored["centres"], stored["objectives"].tolist(), int(stored["refilled"]))


def store_state(partial: Path, job: str, state: State) -> None:
    tensors = {
        "centres": state.centres.contiguous(),
        "objectives": torch.tensor(state.objectives, dtype=torch.float64),
        "refilled": torch.tensor(state.refilled),
        "job": torch.frombuffer(bytearray(job.encode()), dtype=torch.uint8),
    }
    with atomic_file(partial) as file:
        save_file(tensors, file)


def write_clusters(
    embedded: Embedded, settings: ClusterSettings, kmeans: KMeans, state: State
) -> None:
    """Give every clip the cluster of the last centres."""
    found = kmeans.assign(state.centres)
    labels = np.full(len(embedded.names), -1, dtype=np.int64)
    distances = np.full(len(embedded.names), np.nan, dtype=np.float32)
    labels[kmeans.rows] = found.labels.numpy()
    distances[kmeans.rows] = found.squares.sqrt().float().numpy()
    tensors = {
        "labels": torch.from_numpy(labels),
        "distances": torch.from_numpy(distances),
        "centres": state.centres.contiguous(),
    }
    with atomic_file(embedded.folder / ASSIGNMENT) as file:
        save_file(tensors, file)
    sizes = torch.bincount(found.labels, minlength=settings.clusters)
    about: dict[str, Any] = {
        "of": embedded.seal,
        "clusters": settings.clusters,
        "seed": settings.seed,
        "iterations": len(state.objectives),
        "converged": state.converged,
        "objectives": [*state.objectives, found.objective],
        "refilled": state.refilled,
        "sizes": sizes.tolist(),
        "sha256_of_assignment": sha256_of(embedded.folder / ASSIGNMENT),
    }
    write_json(embedded.folder / CLUSTERS, about)
