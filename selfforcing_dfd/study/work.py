"""A study's work: train and measure what is not there yet. Several processes may share it."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm

from selfforcing_dfd.common import EXIT_INTERRUPTED, Interrupted, UserError
from selfforcing_dfd.config import Config
from selfforcing_dfd.data.shards import ShardReader
from selfforcing_dfd.evaluation.tables import DATA
from selfforcing_dfd.models.identity import Identity
from selfforcing_dfd.stages import stage_of
from selfforcing_dfd.stages.config_files import change
from selfforcing_dfd.study.measure import (
    START_ROLES,
    causal_references,
    measure_reference,
    measure_run,
    measure_start,
    point_file,
    provenance,
    references,
    stale,
    write_json,
)
from selfforcing_dfd.study.plan import (
    CAUSAL,
    RESULTS,
    START_FILE,
    Plan,
    StudyRun,
    load_plan,
    reference_config,
    runs_of,
)
from selfforcing_dfd.study.starts import require_starts
from selfforcing_dfd.training.build_data import build_reader
from selfforcing_dfd.training.exclusive import ExclusiveError, lock_folders
from selfforcing_dfd.training.folders import run_folder
from selfforcing_dfd.training.one_run import prepare_data, train
from selfforcing_dfd.training.starts import check_start
from selfforcing_dfd.weights.read import load_network
from selfforcing_dfd.weights.run_record import RUN_FILE
from selfforcing_dfd.weights.runs import STUDENT_FILE
from selfforcing_dfd.weights.tensors import save_weights
from selfforcing_dfd.weights.write import file_metadata

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
NOISE_FILE = "noise.json"  # what finding the clips' noise cost
BEGUN_FILE = "begun.json"  # in a run's folder: what its training began with
LOCKS = "locks"
POLL_S = 2.0
# how settings begin that matter to training alone, and to measuring alone
OF_TRAINING = (
    *("run.", "optim.", "ema.", "batch.", "score.", "dfd.", "regression.", "checkpoint."),
    "weights.",  # files are compared where they matter
)
OF_MEASURING = ("report.",)
GO_ON = "the same command goes on"


@dataclass(frozen=True)
class Task:
    """One result. make: does the work and returns what is written to `result`.

    roles: of the weights that it depends on; None for those that its stage starts from. ignored:
    how settings begin that it does not depend on.
    """

    name: str
    config: Config
    result: Path
    lock: Path
    make: Callable[[], Mapping[str, Any] | None]
    roles: tuple[str, ...] | None = None
    ignored: tuple[str, ...] = ()


def run_study(
    plan_name: str, only: Sequence[str] = (), jobs: int = 1, measure_only: bool = False
) -> str:
    """Do all tasks of a plan whose results are missing; returns what failed, in one line.

    A finished task is skipped, a run that was stopped goes on. measure_only: trains nothing. Every
    job has one thread: scores depend on the number of threads. Raises UserError for settings,
    weights and data that cannot be used, before any work.
    """
    torch.set_num_threads(1)
    plan = load_plan(plan_name)
    runs = runs_of(plan, only)
    require_starts(plan_name, plan, runs)
    for run in runs:
        check_start(run.config)
    prepare(plan)
    tasks = tasks_of(plan, runs, measure_only)
    left = [task for task in tasks if not is_done(task)]
    done = len(tasks) - len(left)
    tqdm.write(f"study {plan_name}: {len(tasks)} results, {done} are there, {len(left)} to make")
    if jobs == 1 or len(left) < 2:
        failures = work(tasks, show=True)
        if failures:
            return f"{len(failures)} of {len(tasks)} results failed, the first: {failures[0]}"
        return ""
    results = [task.result for task in tasks]
    return work_with_others(plan_name, only, jobs, measure_only, results)


def tasks_of(plan: Plan, runs: Sequence[StudyRun], measure_only: bool) -> list[Task]:
    """References first: the first result that a person sees is what others are held against."""
    starts = list(dict.fromkeys(run.start for run in runs))
    some = reference_config(plan, starts[0])
    results = Path(plan.out) / RESULTS
    locks = Path(plan.out) / LOCKS
    tasks = []
    make: Callable[[], Mapping[str, Any] | None]
    for name, source in references(some).items():
        roles = () if name == DATA else (name,)
        make = partial(measure_reference, some, source, roles)
        result = results / f"{name}.json"
        tasks.append(Task(name, some, result, locks / name, make, roles, OF_TRAINING))
    for start in starts:
        own = reference_config(plan, start)
        make = partial(measure_start, plan, own)
        result = results / start / START_FILE
        lock = locks / f"start-{start}"
        tasks.append(Task(f"start {start}", own, result, lock, make, START_ROLES, OF_TRAINING))
        for name, source in causal_references(own).items():
            make = partial(measure_reference, own, source, (CAUSAL,))
            result = results / start / f"{name}.json"
            lock = locks / f"{start}-{name}"
            title = f"start {start}, {name}"
            tasks.append(Task(title, own, result, lock, make, (CAUSAL,), OF_TRAINING))
    for run in runs:
        make = partial(make_run, plan, run, measure_only)
        tasks.append(Task(run.name, run.config, run.result, run_folder(run.config), make))
    return tasks


def make_run(plan: Plan, run: StudyRun, measure_only: bool) -> Mapping[str, Any] | None:
    """Train a run, or go on with it, and measure it; None for one that may not be trained."""
    if measure_only and not (run_folder(run.config) / STUDENT_FILE).exists():
        return None
    begun = run_folder(run.config) / BEGUN_FILE
    if begun.exists():
        refuse_stale(begun, run.config, begun.parent, ignored=OF_MEASURING)
    else:
        write_json(begun, provenance(run.config))
    if not is_of_an_older_version(run):
        train(run.config, resume=True)
    keep_points(run)
    return measure_run(plan, run)


def is_of_an_older_version(run: StudyRun) -> bool:
    """Whether a run was trained and kept before runs had a record; `begun.json` vouches for it."""
    folder = run_folder(run.config)
    kept = all(point_file(run.config, update).exists() for update in run.updates)
    return kept and (folder / STUDENT_FILE).exists() and not (folder / RUN_FILE).exists()


def keep_points(run: StudyRun) -> None:
    """Keep the averaged student of each point, and drop the rest of the checkpoints."""
    checkpoints = run_folder(run.config) / CHECKPOINTS
    for update in run.updates:
        path = point_file(run.config, update)
        if not path.exists():
            checkpoint = checkpoints / f"student_update={update:06d}"
            student = load_network(checkpoint, "ema")
            metadata = file_metadata(student.config, Identity("causal_student"))
            save_weights(path, student, metadata, torch.float32)
    shutil.rmtree(checkpoints, ignore_errors=True)


def is_done(task: Task) -> bool:
    """Whether the result is there. Raises UserError for one that was made in another way."""
    if not task.result.exists():
        return False
    refuse_stale(task.result, task.config, task.lock, task.roles, task.ignored)
    return True


def refuse_stale(
    path: Path,
    config: Config,
    folder: Path,
    roles: tuple[str, ...] | None = None,
    ignored: tuple[str, ...] = (),
) -> None:
    """Raise UserError if what a file says of its making is not what would be done now."""
    found = stale(json.loads(path.read_text(encoding="utf-8")), config, roles, ignored)
    if found:
        raise UserError(
            f"{path} was made in another way, {found}; restore that, give the plan another `out`, "
            f"or delete {path} and {folder} to make it again"
        )


def work(tasks: Sequence[Task], show: bool) -> list[str]:
    """Do every task that nobody else does; returns what failed, one line each."""
    failures = []
    bar = tqdm(total=len(tasks), desc="study", unit="result", dynamic_ncols=True)
    bar.disable = bar.disable or not show
    with bar:
        for task in tasks:
            bar.set_postfix_str(task.name)
            try:
                with lock_folders(task.lock):
                    if not is_done(task):
                        result = task.make()
                        if result is not None:
                            write_json(task.result, result)
            except Interrupted as stopped:
                raise Interrupted(f"{task.name}: stopped and saved; {GO_ON}") from stopped
            except ExclusiveError:
                tqdm.write(f"{task.name}: another process does it")
            except UserError as error:
                failures.append(f"{task.name}: {error}")
                tqdm.write(f"{task.name} failed: {error}")
            bar.update()
    return failures


def prepare(plan: Plan) -> None:
    """Make the clips, and their noise if some arm starts from it; the cost of noise is noted.

    All arms count, whichever are asked for: shards should not change between two runs. An arm may
    have shards of its own; rows that no arm trains are measured beside those of the base. Arms that
    start from stored noise share their shards.
    """
    runs = runs_of(plan)
    some = runs[0].config
    with waiting_for(noise_file(some).parent):
        for config in (some, reference_config(plan, runs[0].start)):
            prepare_data(change(config, ["data.tiny.noise_steps=0"]))
    for noisy in with_stored_noise(runs)[:1]:
        with waiting_for(noise_file(noisy).parent):
            prepare_data(change(noisy, ["data.tiny.noise_steps=0"]))
            if not ShardReader(Path(noisy.data.shards)).has_noise:
                started = time.process_time()
                prepare_data(noisy)
                spent = time.process_time() - started
                write_json(noise_file(noisy), {"core_seconds": spent})
    for run in runs:
        build_reader(run.config)


def with_stored_noise(runs: Sequence[StudyRun]) -> list[Config]:
    """Settings of the runs that start from noise stored with clips."""
    return [run.config for run in runs if stage_of(run.config).needs_noise(run.config)]


def noise_file(config: Config) -> Path:
    """Where it is noted what finding the clips' noise cost: beside shards that studies share."""
    return Path(f"{config.data.shards}-made") / NOISE_FILE


@contextmanager
def waiting_for(folder: Path) -> Iterator[None]:
    """Hold a folder's lock as soon as nobody else does."""
    with ExitStack() as held:
        while True:
            try:
                held.enter_context(lock_folders(folder))
                break
            except ExclusiveError:
                time.sleep(POLL_S)
        yield


def one_of_several(plan_name: str, only: Sequence[str], measure_only: bool) -> None:
    """A process of `work_with_others`. It ends with 1 if some task failed."""
    os.setpgid(0, 0)  # so that Ctrl-C reaches it once, through the first process
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    plan = load_plan(plan_name)
    try:
        failures = work(tasks_of(plan, runs_of(plan, only), measure_only), show=False)
    except Interrupted as stopped:
        raise SystemExit(EXIT_INTERRUPTED) from stopped
    raise SystemExit(1 if failures else 0)


def work_with_others(
    plan_name: str, only: Sequence[str], jobs: int, measure_only: bool, results: Sequence[Path]
) -> str:
    """Share the tasks among `jobs` processes of one thread each; returns whether some failed.

    The process that met a failure has printed it. Ctrl-C and SIGTERM reach all processes: each
    saves its run and ends, and Interrupted is raised.
    """
    os.environ["TQDM_DISABLE"] = "1"  # bars of several processes would overwrite each other
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=one_of_several, args=(plan_name, tuple(only), measure_only))
        for _ in range(jobs)
    ]
    stopped = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        for worker in workers:
            if worker.is_alive():
                worker.terminate()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for worker in workers:
            if not stopped:
                worker.start()
        with tqdm(total=len(results), desc="study", unit="result", dynamic_ncols=True) as bar:
            while any(worker.is_alive() for worker in workers):
                time.sleep(POLL_S / 4)
                bar.update(sum(path.exists() for path in results) - bar.n)
            bar.update(sum(path.exists() for path in results) - bar.n)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopped:
        raise Interrupted(f"stopped and saved; {GO_ON}")
    failed = any(worker.exitcode for worker in workers)
    return "some results failed; the lines above say why, the others are there" if failed else ""
