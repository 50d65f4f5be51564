"""What a run has done so far, as three counters, and whose turn is next.

A cycle is `fake_per_student` turns of the fake score and one of the student. The counters alone
say where in a cycle a run is, so a resume in the middle of one continues exactly. EMA, schedules
and checkpoints count student updates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Literal

from selfforcing_dfd.common import UserError

Turn = Literal["fake", "student"]


@dataclass(slots=True)
class Clock:
    """Updates finished, and the place in the data."""

    student_updates: int = 0
    fake_updates: int = 0
    samples: int = 0  # consumed by all ranks together

    def next_turn(self, fake_per_student: int) -> Turn:
        """Who is updated next; `fake_per_student` 0 stands for a stage without a fake score.

        UserError if these counters cannot have come from cycles of that length.
        """
        in_cycle = self.fake_updates - fake_per_student * self.student_updates
        if not 0 <= in_cycle <= fake_per_student:
            raise UserError(
                f"{self.fake_updates} fake-score updates beside {self.student_updates} student "
                f"updates do not fit {fake_per_student} a cycle; keep the number the run started "
                "with, or start a new run from its weights"
            )
        return "fake" if in_cycle < fake_per_student else "student"

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
        if set(state) != names or min(state.values()) < 0:
            raise ValueError(
                f"clock state is {dict(state)}; it needs {sorted(names)}, none negative"
            )
        for name, count in state.items():
            setattr(self, name, int(count))
