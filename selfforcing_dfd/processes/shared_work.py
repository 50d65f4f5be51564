"""Work in pieces that do not depend on each other, over all processes of a run.

The first process hands pieces out, one to each, and gets the results in order. What it does with
them, such as writing them to files, is the same for any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from selfforcing_dfd.processes.ranks import are_many, gather_to_first, is_first, patient_group

Piece = TypeVar("Piece")
Result = TypeVar("Result")
T = TypeVar("T")
Share = Callable[[Sequence[Piece]], Iterator[Result]]
"""Pieces -> their results in the same order, each made by one of the processes."""


def work_together(
    make: Callable[[Piece], Result], lead: Callable[[Share[Piece, Result]], T], neighbours: int = 1
) -> T:
    """What `lead` returns on the first rank; all ranks get it, or raise its error.

    make: a piece's result, on any rank. lead: runs on the first rank alone and may pass pieces to
    the function that it is given, as often as it likes. neighbours: so many ranks make each piece
    together; all call `make` for it, and the first one's result counts.
    """
    outcome: list[Any] = [None, None]
    if is_first():
        try:
            outcome[0] = lead(lambda pieces: share_out(pieces, make, neighbours))
        except Exception as error:
            outcome[1] = error
        tell(None)
    else:
        help_first(make, neighbours)
    if are_many():
        dist.broadcast_object_list(outcome, group=patient_group())
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def share_out(
    pieces: Sequence[Piece], make: Callable[[Piece], Result], neighbours: int
) -> Iterator[Result]:
    """On the first rank: results of all pieces in order; one round gives each group one piece.

    Raises the error of the first piece that cannot be made.
    """
    size = dist.get_world_size() // neighbours if are_many() else 1
    for start in range(0, len(pieces), size):
        at_once = tell(list(pieces[start : start + size]))
        for result, error in gather_to_first([attempt(make, at_once[0])]):
            if error is not None:
                raise error
            yield result


def help_first(make: Callable[[Any], Any], neighbours: int) -> None:
    """On other ranks: make what the first one hands out, until it has no more."""
    group, place = divmod(dist.get_rank(), neighbours)
    while (pieces := tell(None)) is not None:
        made = [attempt(make, piece) for piece in pieces[group : group + 1]]
        gather_to_first([each for each in made if place == 0 or each[1] is not None])


def attempt(make: Callable[[Any], Any], piece: Any) -> tuple[Any, Exception | None]:
    """(result, error) of a piece. An error waits until the round is over: all ranks are in it."""
    try:
        return make(piece), None
    except Exception as error:
        if are_many():
            error.add_note(f"made on rank {dist.get_rank()}")
        return None, error


def tell(pieces: list[Any] | None) -> Any:
    """The first rank's pieces of one round, on all ranks; None after the last round."""
    message = [pieces]
    if are_many():
        dist.broadcast_object_list(message, group=patient_group())
    return message[0]
