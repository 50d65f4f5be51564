"""Scripts and commands in forks of this process, which spares the seconds of their imports.

All else is as in a process of its own: signals, exit codes, what is printed, and a sudden death.
What Python does at its end is left out.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import signal
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

from selfforcing_dfd.common import shipped

LIMIT_S = 120


@dataclass(frozen=True, slots=True)
class End:
    """How a process ended. code: minus the signal that killed it, if one did."""

    code: int
    printed: str
    errors: str


class Script:
    """`python SCRIPT ARGUMENTS` in the repository's root. folder: for what it prints."""

    def __init__(self, folder: Path, script: str, *arguments: str) -> None:
        self.files = [folder / f"{Path(script).stem}.{name}" for name in ("stdout", "stderr")]
        self.process = multiprocessing.get_context("fork").Process(
            target=_child, args=(self.files, script, arguments)
        )
        self.process.start()

    @property
    def runs(self) -> bool:
        return self.process.is_alive()

    def send_signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def end(self) -> End:
        """Wait for the end. AssertionError, and the process is killed, if it takes too long."""
        self.process.join(LIMIT_S)
        if self.runs:
            self.process.kill()
            raise AssertionError(f"no end within {LIMIT_S} s: {self.files[1].read_text()}")
        assert self.process.exitcode is not None
        return End(self.process.exitcode, *(file.read_text() for file in self.files))


def run_script(folder: Path, script: str, *arguments: str) -> End:
    return Script(folder, script, *arguments).end()


def _child(files: list[Path], script: str, arguments: tuple[str, ...]) -> None:
    gc.disable()  # what the parent left behind is not to be collected in a fork: it crashed
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout, sys.stderr = (file.open("w", buffering=1) for file in files)
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        os.dup2(stream.fileno(), number)
    os.chdir(shipped("."))
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
