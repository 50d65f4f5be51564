"""What a run has done so far, as three counters, and whose turn is next.

A cycle is some turns of the fake score, then some of the student's regression on real clips, and
one of the student. The counters alone say where in a cycle a run is, so a resume in the middle of
one continues exactly. EMA, schedules and checkpoints count student updates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Literal, get_args

from selfforcing_dfd.common import UserError

Turn = Literal["fake", "regression", "student"]
TURNS: tuple[Turn, ...] = get_args(Turn)


@dataclass(slots=True)
class Clock:
    """Updates finished, and the place in the data."""

    student_updates: int = 0
    fake_updates: int = 0
    regression_updates: int = 0
    samples: int = 0  # consumed by all ranks together

    def next_turn(self, fake_per_student: int, regression_per_student: int = 0) -> Turn:
        """Who is updated next; 0 stands for a stage without such turns.

        UserError if these counters cannot have come from cycles of that length.
        """
        done = self.student_updates
        fake = self.fake_updates - fake_per_student * done
        regression = self.regression_updates - regression_per_student * done
        fits = 0 <= fake <= fake_per_student and 0 <= regression <= regression_per_student
        if not fits or (regression > 0 and fake < fake_per_student):
            raise UserError(
                f"{self.fake_updates} fake-score and {self.regression_updates} regression updates "
                f"beside {done} student updates do not fit {fake_per_student} and "
                f"{regression_per_student} a cycle; keep the numbers the run started with, or "
                "start a new run from its weights"
            )
        if fake < fake_per_student:
            return "fake"
        return "regression" if regression < regression_per_student else "student"

    def count(self, turn: str) -> int:
        """Updates finished in turns of this kind."""
        counts = {
            "student": self.student_updates,
            "fake": self.fake_updates,
            "regression": self.regression_updates,
        }
        return counts[turn]

    def advance(self, turn: Turn, samples: int) -> None:
        """Count one finished turn and the samples that all ranks together consumed in it."""
        if turn == "student":
            self.student_updates += 1
        elif turn == "fake":
            self.fake_updates += 1
        else:
            self.regression_updates += 1
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
