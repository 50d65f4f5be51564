"""Sequences that several processes share while they train: `model.sequence_ranks`.

The processes of a run form a grid of data x sequence. Neighbours in rank share sequences, so they
should be GPUs of one machine: they exchange tokens for heads twice in every block. How weights are
spread (`model.shard_ranks`) does not depend on it: all processes hold parts of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from selfforcing_dfd.config import require
from selfforcing_dfd.models.sequence_parallel import SequenceParallel
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.processes.ranks import group_of_neighbours
from selfforcing_dfd.processes.world import World


def in_groups(world: World, ranks: int) -> World:
    """The world whose processes share sequences in groups of `ranks`. ConfigError for a remainder.

    Nothing is set up yet.
    """
    fitting = [size for size in range(1, world.size + 1) if world.size % size == 0]
    require(
        world.size % ranks == 0,
        f"model.sequence_ranks is {ranks}, but {world.size} process{'es' * (world.size > 1)} "
        f"would train; use one of {', '.join(map(str, fitting))}, or start a multiple of {ranks} "
        "processes",
    )
    return replace(world, sequence_ranks=ranks)


def share_sequences(
    world: World,
    networks: Mapping[str, WanTransformer],
    latent_size: tuple[int, int],
    timeout_s: float,
) -> None:
    """From now on each group of processes calls the networks together, each with its tokens.

    networks: by role. latent_size: rows and columns. timeout_s: a process that waits longer for
    its group gives up. ConfigError for heads or tokens that cannot be shared evenly.
    """
    ranks = world.sequence_ranks
    if ranks == 1:
        return
    check_heads(ranks, networks)
    for role, network in networks.items():
        _, rows, columns = network.patch
        tokens = (latent_size[0] // rows) * (latent_size[1] // columns)
        require(
            tokens % ranks == 0,
            f"model.sequence_ranks is {ranks}, but a latent frame of {latent_size[0]} x "
            f"{latent_size[1]} has {tokens} tokens in the {role}; use a number that divides them",
        )
    sequence = SequenceParallel(group_of_neighbours(ranks, timeout_s))
    for network in networks.values():
        network.share_sequence(sequence)


def check_heads(ranks: int, networks: Mapping[str, WanTransformer]) -> None:
    """ConfigError unless `ranks` divides the heads of every network."""
    heads = {role: network.config["num_attention_heads"] for role, network in networks.items()}
    fewest = min(heads.values())
    fitting = [n for n in range(1, fewest + 1) if not any(count % n for count in heads.values())]
    shown = ", ".join(f"{role} {count}" for role, count in heads.items())
    require(
        ranks in fitting,
        f"model.sequence_ranks is {ranks}, which does not divide the heads of all networks "
        f"({shown}); use one of {', '.join(map(str, fitting))}",
    )


def describe_grid(size: int, sequence_ranks: int, shard_ranks: int) -> str:
    """In words: what each of `size` processes shares with which others."""
    if size == 1:
        return "1"
    samples = f"{size // sequence_ranks} x {sequence_ranks}: samples over {size // sequence_ranks}"
    sequence = f"each sequence over {sequence_ranks}" if sequence_ranks > 1 else "whole sequences"
    return f"{samples}, {sequence}, weights over {shard_ranks or size}"
