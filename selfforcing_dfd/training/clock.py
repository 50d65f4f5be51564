"""What a run has done so far, as three counters, and whose turn follows from them.

A cycle is `fake_per_student` turns of the fake score and one of the student. Only the counters say
where in a cycle a run is, so a resume in the middle of one continues exactly. EMA, schedules and
checkpoints count student updates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Literal

Turn = Literal["fake", "student"]


@dataclass(slots=True)
class Clock:
    """Updates finished, and the data cursor: `samples` is the number of samples consumed by all
    ranks together.
    """

    student_updates: int = 0
    fake_updates: int = 0
    samples: int = 0

    def next_turn(self, fake_per_student: int) -> Turn:
        """Who is updated next. `fake_per_student` 0 is a stage without a fake score: every turn is
        the student's.

        ValueError if these counters cannot have come from cycles of that length.
        """
        in_cycle = self.fake_updates - fake_per_student * self.student_updates
        if not 0 <= in_cycle <= fake_per_student:
            raise ValueError(
                f"{self.fake_updates} fake-score updates beside {self.student_updates} student updates do not fit "
                f"{fake_per_student} a cycle; keep the number the run began with, or start a new run from its weights"
            )
        return "fake" if in_cycle < fake_per_student else "student"

    def turns(self, fake_per_student: int) -> Iterator[Turn]:
        """Turns without end, each derived anew from the counters: `advance` the clock after each
        one.
        """
        while True:
            yield self.next_turn(fake_per_student)

    def advance(self, turn: Turn, samples: int) -> None:
        """Count one finished turn and the samples that all ranks together consumed in it."""
        if turn == "student":
            self.student_updates += 1
        else:
            self.fake_updates += 1
        self.samples += samples

    def state_dict(self) -> dict[str, int]:
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """ValueError unless `state` has exactly our counters, none of them negative."""
        names = {field.name for field in fields(self)}
        if set(state) != names or any(count < 0 for count in state.values()):
            raise ValueError(
                f"clock state is {dict(state)}; it needs {sorted(names)}, none negative"
            )
        for name, count in state.items():
            setattr(self, name, int(count))
