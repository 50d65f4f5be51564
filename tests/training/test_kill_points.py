"""kill -9 at random moments of training, inside of saves too: a resume loses nothing, to the bit.

KILLS=10 in the environment makes ten of the two hundred kills, KILL_SEED=3 others.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launcher import launch, said
from test_faults import RESULTS, metrics_of

from selfforcing_dfd.cli.train import run
from selfforcing_dfd.common import PARTIAL
from selfforcing_dfd.config import Config
from selfforcing_dfd.processes.world import World
from selfforcing_dfd.training.folders import run_folder
from tests.training.conftest import config_in

NUM_KILLS = int(os.environ.get("KILLS", "200"))
SEED = int(os.environ.get("KILL_SEED", "0"))
KILLS_A_RUN = 5
LATE_S = 0.03  # a save of this network takes about as long
LIMIT_S = 300.0
FEW = (
    *("run.student_updates=8", "checkpoint.every=1", "checkpoint.keep=2", "rollout.ladder=[1000]"),
    *("score.fake_per_student=1", "batch.size=2", "batch.micro=1", "ema.decay=0.5"),
    *("optim.student.warmup=3", "optim.student.decay=0.1"),
)


def config_below(folder: Path, world: Path, background: str = "always") -> Config:
    """The config of a run in a new folder. Exports state a run's name, so all have the same."""
    folder.mkdir()
    return config_in(folder, world, *FEW, f"checkpoint.background={background}")


def kill_in(folder: Path, chance: random.Random, usual_s: float) -> Callable[[], None]:
    """What kills this process later: after a random time, or soon after it began to write."""
    waits_for_write = chance.random() < 0.5
    wait_s = chance.random() * usual_s
    late_s = chance.random() * LATE_S
    before = leftovers(folder)

    def kill() -> None:
        end = time.monotonic() + wait_s
        while time.monotonic() < end:
            time.sleep(0.001)
        while waits_for_write and leftovers(folder) <= before:
            time.sleep(0.0005)
        time.sleep(late_s * waits_for_write)
        os.kill(os.getpid(), signal.SIGKILL)

    return kill


def leftovers(folder: Path) -> set[Path]:
    """What is being written, or was when a process died."""
    return {*folder.glob(f"{PARTIAL}*"), *folder.glob(f"checkpoints/{PARTIAL}*")}


def train_apart(config: Config, kill: Callable[[], None] | None) -> int:
    """Go on with a run in a process of its own; its exit code."""

    def work() -> None:
        sys.stderr = (run_folder(config).parent / "errors").open("a", buffering=1)
        if kill is not None:
            threading.Thread(target=kill, daemon=True).start()
        run(config, resume=True)
        sys.stderr.flush()
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=work)
    run_folder(config).mkdir(parents=True, exist_ok=True)
    process.start()
    process.join(LIMIT_S)
    if process.is_alive():
        process.kill()
        raise AssertionError("a resumed run does not end")
    assert process.exitcode is not None
    return process.exitcode


@pytest.mark.soak
@pytest.mark.parametrize("background", ["never", "always"])
def test_random_kill_points(world: Path, tmp_path: Path, background: str) -> None:
    """Catches whatever is written in two steps, and anything of a run that no checkpoint holds."""
    whole = config_below(tmp_path / "whole", world, background)
    started = time.monotonic()
    assert train_apart(whole, None) == 0
    usual_s = time.monotonic() - started
    chance = random.Random(SEED)
    num_kills = 0
    num_in_writes = 0
    for run_number in itertools.count():
        if num_kills >= NUM_KILLS // 2:
            break
        config = config_below(tmp_path / f"killed{run_number}", world, background)
        folder = run_folder(config)
        for number in range(KILLS_A_RUN + 1):
            before = leftovers(folder)
            kill = kill_in(folder, chance, usual_s) if number < KILLS_A_RUN else None
            code = train_apart(config, kill)
            if code == 0:
                break
            assert code == -signal.SIGKILL, (folder.parent / "errors").read_text()
            num_kills += 1
            num_in_writes += not leftovers(folder) <= before
        for name in RESULTS:
            assert (folder / name).read_bytes() == (run_folder(whole) / name).read_bytes(), folder
        assert metrics_of(folder) == metrics_of(run_folder(whole)), folder
    assert num_in_writes > NUM_KILLS // 40, "too few kills hit a write; the test proves little"


@pytest.mark.soak
def test_random_kill_points_of_one_of_two_processes(world: Path, tmp_path: Path) -> None:
    """Catches ranks that resume from different places, and a rank that waits for a dead one."""
    chance = random.Random(SEED)

    def go_on(config: Config, kill: Callable[[], None] | None, rank: int) -> list[tuple[int, str]]:
        def work(world: World) -> None:
            if kill is not None and world.rank == rank:
                threading.Thread(target=kill, daemon=True).start()
            run(config, resume=True)

        return launch(2, tmp_path, work)

    whole = config_below(tmp_path / "whole", world)
    started = time.monotonic()
    assert [code for code, _ in go_on(whole, None, 0)] == [0, 0]
    usual_s = time.monotonic() - started
    config = config_below(tmp_path / "killed", world)
    for _ in range(max(NUM_KILLS // 20, 1)):
        rank = chance.randrange(2)
        ends = go_on(config, kill_in(run_folder(config), chance, usual_s / 2), rank)
        if ends[rank][0] != 0:
            assert f"rank {rank} ended without a word" in "".join(said(ends))
    assert [code for code, _ in go_on(config, None, 0)] == [0, 0]
    for name in RESULTS:
        assert (run_folder(config) / name).read_bytes() == (run_folder(whole) / name).read_bytes()
    assert metrics_of(run_folder(config)) == metrics_of(run_folder(whole))
