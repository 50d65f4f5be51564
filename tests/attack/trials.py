"""Trials: something is harmed at random and used, and nothing may go wrong without a word.

Each trial is a process of its own, so that a crash or a hang is seen and ends that trial alone.
All that is random follows from a seed, the kind of thing and the number of the trial.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from selfforcing_dfd.cli.errors import explain
from selfforcing_dfd.cli.main import main
from selfforcing_dfd.common import EXIT_USER_ERROR, UserError, peak_resident_bytes

LIMIT_S = 60.0
POLL_S = 0.005
MORE_MEMORY = 1 << 30  # bytes beyond those of the process that starts the trials
REPORT_FILE = "report.json"
Outcome = Literal["refused", "unharmed", "FAILED"]
Tell = Callable[[str], None]
"""Says what is harmed, before anything can go wrong."""


class Wrong(Exception):
    """Something went wrong without a word, or with a traceback."""


class Kind(ABC):
    """Things of one kind that are attacked."""

    name = ""

    def prepare(self, folder: Path) -> None:  # noqa: B027 - a kind may need nothing
        """Make what is harmed later, once, in a folder of this kind; trials work on copies."""

    @abstractmethod
    def attack(self, chance: random.Random, place: Path, tell: Tell) -> None:
        """Harm something in `place`, an empty folder, and use it.

        A return says that the result is equal to the unharmed one. An error that commands explain
        to the user is a refusal. `Wrong`, and every other error, is a fault.
        """

    def close(self) -> None:  # noqa: B027 - likewise
        """End what `prepare` has started."""


@dataclass(frozen=True, slots=True)
class Trial:
    """How one trial ended. said: the refusal, or what is wrong."""

    kind: str
    number: int
    outcome: Outcome
    harm: str
    said: str
    seconds: float


@dataclass(slots=True)
class _Running:
    number: int
    process: int
    place: Path
    started: float


def command(*words: str) -> str:
    """All output of a command of this package that ends well.

    UserError where it ends with a message for the user. Wrong, with the last lines, otherwise.
    """
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = main(words)
    said = output.getvalue()
    is_explained = code == EXIT_USER_ERROR and "error: " in said
    if "Traceback (most" in said or not (code == 0 or is_explained):
        raise Wrong(f"exit code {code}: {said[-1500:]}")
    if is_explained:
        raise UserError(said)
    return said


def run_trials(
    kind: Kind,
    numbers: Iterator[int],
    folder: Path,
    seed: int,
    jobs: int = 1,
    until: float = float("inf"),
    limit_s: float = LIMIT_S,
) -> Iterator[Trial]:
    """Trials of the given numbers, as they end; none is begun after `until` (monotonic seconds)."""
    running: list[_Running] = []
    left = iter(numbers)
    while True:
        while len(running) < jobs and time.monotonic() < until:
            number = next(left, None)
            if number is None:
                break
            running.append(_start(kind, number, folder / f"{kind.name}-{number}", seed))
        if not running:
            return
        time.sleep(POLL_S)
        for one in list(running):
            ended, status = os.waitpid(one.process, os.WNOHANG)
            seconds = time.monotonic() - one.started
            if not ended and seconds < limit_s:
                continue
            if not ended:
                os.kill(one.process, signal.SIGKILL)
                os.waitpid(one.process, 0)
            running.remove(one)
            fate = _fate(os.waitstatus_to_exitcode(status)) if ended else f"no end in {limit_s:g} s"
            yield _trial(kind, one, fate, seconds)


def _start(kind: Kind, number: int, place: Path, seed: int) -> _Running:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        _child(kind, random.Random(f"{seed} {kind.name} {number}"), place)
    return _Running(number, process, place, time.monotonic())


def _child(kind: Kind, chance: random.Random, place: Path) -> None:
    """One trial, whose report lies beside its place; never returns."""
    gc.disable()  # what the parent left behind is not to be collected in a fork: it crashed
    report: dict[str, Any] = {"harm": "", "outcome": "FAILED", "said": "ended too early"}
    report_file = place.with_suffix(".json")

    def write() -> None:
        report_file.write_text(json.dumps(report))

    def tell(harm: str) -> None:
        report["harm"] = harm
        write()

    with (place.with_suffix(".log")).open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    memory = peak_resident_bytes()
    try:
        kind.attack(chance, place, tell)
        report |= {"outcome": "unharmed", "said": ""}
    except Exception as error:
        message = None if isinstance(error, Wrong) else explain(error)
        refused = {"outcome": "refused", "said": message}
        wrong = str(error) if isinstance(error, Wrong) else traceback.format_exc()
        report |= {"outcome": "FAILED", "said": wrong} if message is None else refused
    more = peak_resident_bytes() - memory
    if more > MORE_MEMORY:
        report |= {"outcome": "FAILED", "said": f"took {more / 1e9:.1f} GB; {report['said']}"}
    write()
    os._exit(0)


def _fate(code: int) -> str:
    return "" if code == 0 else f"the process ended with {code}"


def _trial(kind: Kind, one: _Running, fate: str, seconds: float) -> Trial:
    report_file = one.place.with_suffix(".json")
    found = {"harm": "not told", "outcome": "FAILED", "said": ""}
    if report_file.exists():
        found = json.loads(report_file.read_text())
    outcome = "FAILED" if fate else found["outcome"]
    said = fate or found["said"]
    shutil.rmtree(one.place, ignore_errors=True)
    for ending in (".json", ".log"):
        one.place.with_suffix(ending).unlink(missing_ok=True)
    return Trial(kind.name, one.number, outcome, found["harm"], said, seconds)


def repeat_command(trial: Trial, seed: int) -> str:
    """What runs a trial again."""
    return f"python -m tests.attack --seed {seed} --trial {trial.kind}:{trial.number}"


def described(trial: Trial, seed: int) -> str:
    """A trial that failed, for people who mend it."""
    said = "\n    ".join(trial.said.strip().splitlines()[-25:])
    again = repeat_command(trial, seed)
    return f"FAILED {trial.kind} {trial.number}: {trial.harm}\n  again: {again}\n    {said}"


def table(trials: Sequence[Trial]) -> str:
    """How many trials of each kind ended how."""
    lines = [f"{'kind':<14}{'trials':>8}{'refused':>9}{'unharmed':>10}{'FAILED':>8}{'slowest':>10}"]
    for name in [*dict.fromkeys(trial.kind for trial in trials), "all"]:
        own = [trial for trial in trials if name in ("all", trial.kind)]
        ends = Counter(trial.outcome for trial in own)
        slowest = max((trial.seconds for trial in own), default=0.0)
        counts = f"{ends['refused']:>9}{ends['unharmed']:>10}{ends['FAILED']:>8}"
        lines.append(f"{name:<14}{len(own):>8}{counts}{slowest:>8.1f} s")
    return "\n".join(lines)


def limit_memory(more_bytes: int = 16 << 30) -> None:
    """Processes of trials cannot take the machine's memory."""
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (more_bytes, most))
