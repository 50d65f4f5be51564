"""`make attack`: harm everything that the package reads, at random, and see that nothing breaks.

python -m tests.attack                            all kinds, 10 minutes on 2 cores
python -m tests.attack --minutes 1 --only shards
python -m tests.attack --seed 0 --trial shards:17     one trial again
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tests.attack.kinds import KINDS, SHARES  # noqa: E402
from tests.attack.trials import Trial, described, limit_memory, run_trials, table  # noqa: E402


def main() -> int:
    """The exit code: 0 if no trial failed, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=9.5, help="in all (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="of all chances (default: from the clock)")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="kinds")
    parser.add_argument("--trial", metavar="KIND:NUMBER", help="one trial again")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="trials at a time")
    options = parser.parse_args()
    seed = int(time.time()) if options.seed is None else options.seed
    torch.set_num_threads(1)
    limit_memory()
    with tempfile.TemporaryDirectory(prefix="attack-") as folder:
        if options.trial:
            name, _, number = options.trial.partition(":")
            trials = list(of_kind(name, Path(folder), seed, iter([int(number)]), 1))
        else:
            trials = of_all(options, Path(folder), seed)
    for trial in trials:
        if options.trial:
            print(f"{trial.outcome}: {trial.harm}\n{trial.said}")
    print(table(trials))
    print(f"seed {seed}")
    return int(any(trial.outcome == "FAILED" for trial in trials))


def of_all(options: argparse.Namespace, folder: Path, seed: int) -> list[Trial]:
    """Trials of all kinds, each for its share of the time."""
    trials = []
    left = options.minutes * 60.0
    for position, name in enumerate(options.only):
        started = time.monotonic()
        shares = [SHARES[each] for each in options.only[position:]]
        until = started + left * shares[0] / sum(shares)
        for trial in of_kind(name, folder, seed, itertools.count(), options.jobs, until):
            trials.append(trial)
            if trial.outcome == "FAILED":
                print(described(trial, seed), flush=True)
        left -= time.monotonic() - started
    return trials


def of_kind(
    name: str,
    folder: Path,
    seed: int,
    numbers: Iterator[int],
    jobs: int,
    until: float = float("inf"),
) -> Iterator[Trial]:
    kind = KINDS[name]()
    own = folder / name
    own.mkdir()
    kind.prepare(own)
    try:
        yield from run_trials(kind, numbers, folder / "trials", seed, jobs, until)
    finally:
        kind.close()


if __name__ == "__main__":
    sys.exit(main())
