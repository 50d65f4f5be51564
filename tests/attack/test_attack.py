"""A short form of `make attack` with fixed chances, and the harness itself."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from selfforcing_dfd.common import UserError
from tests.attack.kinds import KINDS
from tests.attack.trials import Kind, Tell, Trial, Wrong, command, described, run_trials, table

SEED = 1
NUM_TRIALS = {
    "configs": 10,
    "weights": 16,
    "shards": 16,
    "tars": 12,
    "clips": 16,
    "runs": 3,
    "trainings": 3,
    "server": 12,
}


@pytest.mark.parametrize("name", KINDS)
def test_nothing_breaks_without_a_word(name: str, tmp_path: Path) -> None:
    """Catches a traceback, a hang or a wrong result for what is damaged or absurd.

    `make attack` does the same for ten minutes, with chances of its own.
    """
    kind = KINDS[name]()
    kind.prepare(tmp_path)
    try:
        trials = list(run_trials(kind, iter(range(NUM_TRIALS[name])), tmp_path / "trials", SEED))
    finally:
        kind.close()
    failed = [described(trial, SEED) for trial in trials if trial.outcome == "FAILED"]
    assert not failed, "\n".join(failed)
    assert len(trials) == NUM_TRIALS[name]
    assert all(trial.harm for trial in trials)


class Odd(Kind):
    """A kind of which each trial ends in another way."""

    name = "odd"

    def attack(self, chance: random.Random, place: Path, tell: Tell) -> None:
        number = int(place.name.rpartition("-")[2])
        tell(f"harm {number}, chance {chance.random():.6f}")
        if number == 1:
            raise UserError("so it is")
        if number == 2:
            raise Wrong("other weights")
        if number == 3:
            raise KeyError("a fault")
        if number == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 5:
            time.sleep(600)
        if number == 6:
            command("no-such-command")


def test_every_way_to_fail_is_seen(tmp_path: Path) -> None:
    """Catches a harness that takes a crash, a hang or a traceback for a success."""
    trials = {
        trial.number: trial
        for trial in run_trials(Odd(), iter(range(7)), tmp_path, SEED, jobs=7, limit_s=5)
    }
    ends = [trials[number].outcome for number in range(7)]
    assert ends == ["unharmed", "refused", *["FAILED"] * 4, "refused"]
    wanted = ["", "so it is", "other weights", "KeyError", "ended with -9", "no end in 5 s"]
    for number, said in enumerate(wanted):
        assert said in trials[number].said
    assert "there is no command no-such-command" in trials[6].said
    assert "--seed 1 --trial odd:3" in described(trials[3], SEED)
    last = table(list(trials.values())).splitlines()[-1].split()
    assert last[:5] == ["all", "7", "2", "1", "4"]


def test_a_trial_can_be_repeated(tmp_path: Path) -> None:
    """Catches chances that depend on the trials before, or on the time."""

    def harms(numbers: list[int], seed: int) -> list[str]:
        found: list[Trial] = list(run_trials(Odd(), iter(numbers), tmp_path, seed))
        return [trial.harm for trial in found]

    both = harms([0, 7], SEED)
    assert harms([7], SEED) == both[1:]
    assert harms([7], SEED + 1) != both[1:]
