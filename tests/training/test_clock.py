"""Whose turn it is must follow from the counters alone."""

import pytest

from selfforcing_dfd.training.clock import Clock


def run_turns(clock: Clock, fake_per_student: int, num_turns: int) -> list[str]:
    taken: list[str] = []
    for _ in range(num_turns):
        turn = clock.next_turn(fake_per_student)
        clock.advance(turn, samples=4)
        taken.append(turn)
    return taken


def test_a_cycle_is_k_fake_turns_then_the_student() -> None:
    """Catches an off-by-one in the cycle, whose ratio DMD's stability depends on."""
    assert run_turns(Clock(), 3, 9) == ["fake", "fake", "fake", "student"] * 2 + ["fake"]


def test_without_a_fake_score_every_turn_is_the_students() -> None:
    """Catches a division or modulo by zero in stages that train one network."""
    clock = Clock()
    assert run_turns(clock, 0, 3) == ["student"] * 3
    assert (clock.student_updates, clock.fake_updates, clock.samples) == (3, 0, 12)


@pytest.mark.parametrize("stop", range(12))
def test_resuming_anywhere_in_a_cycle_continues_it(stop: int) -> None:
    """Catches a turn kept outside the state (a loop variable).

    Resumed runs would start the cycle again.
    """
    whole = run_turns(Clock(), 5, 12)
    before = Clock()
    first = run_turns(before, 5, stop)
    after = Clock()
    after.load_state_dict(before.state_dict())
    assert first + run_turns(after, 5, 12 - stop) == whole


def test_another_cycle_length_is_refused() -> None:
    """Catches a resume with fake_per_student 3 after 5.

    The student would train alone until the counters fit again.
    """
    clock = Clock(student_updates=40, fake_updates=200)
    assert clock.next_turn(5) == "fake"
    with pytest.raises(
        ValueError,
        match="200 fake-score and 0 regression updates beside 40 student updates do not fit 3",
    ):
        clock.next_turn(3)
    with pytest.raises(ValueError, match="do not fit 6"):
        clock.next_turn(6)


@pytest.mark.parametrize(
    "state", [{"student_updates": 1}, {"student_updates": 1, "fake_updates": 0, "samples": -1}]
)
def test_a_strange_state_is_refused(state: dict[str, int]) -> None:
    """Catches a lenient load.

    A missing data cursor would start the data again from the first sample.
    """
    clock = Clock(samples=7)
    with pytest.raises(ValueError, match="clock state is"):
        clock.load_state_dict(state)
    assert clock == Clock(samples=7)
