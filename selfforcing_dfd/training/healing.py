"""What a run does about values that are not finite: back to its newest checkpoint, without them.

The samples of the turn are named and set aside from their place in the data on, so the same turn
sees others when it comes again. All else is as in any resume: exact, and bounded by `run.retries`.
Single samples are set aside where they alone are at fault, else all of the turn.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from selfforcing_dfd.common import UserError
from selfforcing_dfd.data.order import load_batch
from selfforcing_dfd.data.shards import NonFiniteSampleError
from selfforcing_dfd.processes.ranks import gather_objects
from selfforcing_dfd.rng import Draw
from selfforcing_dfd.training.compare import listed
from selfforcing_dfd.training.finite import (
    NonFiniteError,
    NonFiniteStateError,
    NonFiniteWeightsError,
)
from selfforcing_dfd.training.loop import Trainer, to_device
from selfforcing_dfd.weights.run_record import RunRecord

logger = logging.getLogger(__name__)


class RetriesError(UserError):
    """A run met values that are not finite more often than it may go back."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A turn that met values which are not finite.

    keys: of the samples to set aside. since: position in the data where the turn began.
    """

    message: str
    keys: tuple[str, ...]
    since: int


def failure_of(trainer: Trainer, error: NonFiniteError | NonFiniteSampleError) -> Failure:
    """Which samples to blame for an error that ended `trainer.run`."""
    since = trainer.clock.samples
    if isinstance(error, NonFiniteStateError):
        since -= trainer.batch_size  # it was seen after the turn
    if isinstance(error, NonFiniteSampleError):
        return Failure(str(error), (error.key,), since)
    positions = range(since, since + trainer.batch_size)
    can_tell = not isinstance(error, NonFiniteStateError | NonFiniteWeightsError)
    blamed = blamed_alone(trainer) if can_tell else []
    keys = keys_at(trainer, blamed or positions)
    return Failure(str(error), tuple(dict.fromkeys(keys)), since)


def blamed_alone(trainer: Trainer) -> list[int]:
    """Positions of the coming turn whose samples by themselves have a loss that is not finite.

    Each process looks at its own samples, and all learn of all. They call their networks together,
    as in training.
    """
    own = [position for draw in trainer.draws() for position in draw.positions]
    bad = [position for position in own if not is_finite_alone(trainer, position)]
    return sorted(position for rank in gather_objects(bad) for position in rank)


def is_finite_alone(trainer: Trainer, position: int) -> bool:
    """Whether the loss of the coming turn is finite for the sample at a position by itself."""
    turn = trainer.clock.next_turn(
        trainer.stage.fake_per_student, trainer.stage.regression_per_student
    )
    start = trainer.clock.samples
    micro_start = position - (position - start) % trainer.micro
    draw = Draw(trainer.seed, start, trainer.batch_size, micro_start, (position,))
    batch = to_device(load_batch(trainer.reader, trainer.order, position, 1), trainer.world.device)
    with torch.no_grad():
        loss = trainer.stage.loss(turn, batch, draw, trainer.clock.student_updates).loss
    return bool(loss.isfinite())


def keys_at(trainer: Trainer, positions: range | list[int]) -> Iterator[str]:
    """Keys of the samples at these positions in the data."""
    for position in positions:
        number = trainer.order.sample_at(position)
        yield trainer.reader.index.samples[number].key


def without_samples(record: RunRecord, failure: Failure, retries: int) -> RunRecord:
    """The record with the samples set aside. RetriesError if that was done `retries` times."""
    keys = listed(failure.keys, 8)
    if record.retries >= retries:
        raise RetriesError(
            f"{failure.message}\nTraining went back to a checkpoint {record.retries} times "
            f"(run.retries is {retries}), each time without the samples at fault. Where it went "
            "wrong again in other samples, the cause is the run and not its data: start again with "
            "a lower learning rate or tighter clipping. To go on all the same, raise run.retries. "
            f"The samples of this turn:{keys}"
        )
    logger.warning(
        "%s\nTraining goes back to its newest checkpoint and leaves these samples out:%s",
        failure.message,
        keys,
    )
    new = {key: failure.since for key in failure.keys if key not in record.aside}
    return replace(record, aside={**record.aside, **new}, retries=record.retries + 1)
