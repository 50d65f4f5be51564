"""`python -m benchmarks.gpu STAGE --out DIR`, and `python -m benchmarks.gpu page`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.gpu.page import RESULTS, read_results, render
from benchmarks.gpu.record import Machine, Record
from benchmarks.gpu.stages import LIMIT_S, STAGES
from selfforcing_dfd.common import UserError, find_device


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("task", choices=[*STAGES, "page", "list"], metavar="STAGE")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results, or the page")
    parser.add_argument("--results", type=Path, default=RESULTS, help="with page: what it shows")
    parser.add_argument("--small", action="store_true", help="sizes to rehearse with on a CPU")
    parser.add_argument("--limit", type=float, default=LIMIT_S, metavar="S", help="seconds")
    parser.add_argument("--only", default="", metavar="WORDS", help="rows whose name has them")
    parser.add_argument("--go-on", action="store_true", help="leave out what was measured before")
    options = parser.parse_args(words)
    if options.task == "list":
        print("\n".join(STAGES))
    elif options.task == "page":
        options.out.write_text(render(read_results(options.results)))
        print(f"wrote {options.out}")
    else:
        run_stage(options)
    return 0


def run_stage(options: argparse.Namespace) -> None:
    device = find_device("cpu" if options.small else "cuda")
    path = options.out / f"{options.task}.json"
    machine = Machine(device, options.small)
    record = Record(path, options.task, machine, options.limit, options.only, options.go_on)
    STAGES[options.task](record)
    record.end()
    print(f"wrote {path}")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
