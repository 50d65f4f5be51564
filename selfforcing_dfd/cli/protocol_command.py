"""The command `protocol`."""

from __future__ import annotations

import argparse

from selfforcing_dfd.cli.options import DEVICE_HELP, Run
from selfforcing_dfd.common import UserError

DO = ("all", "videos", "numbers", "report")


def protocol(parser: argparse.ArgumentParser) -> Run:
    """Run a protocol: prompts x seeds x methods -> videos -> numbers -> one report.

    What is there already is kept, so the same command goes on after a stop. Any number of
    processes, on one machine or on several that share the folder, may run it at once. Protocols lie
    in configs/protocol: tiny (half a minute on a CPU), long, the DFD paper's tables (paper/table1).
    """
    add_options(parser)

    def run(args: argparse.Namespace) -> None:
        if args.wait and args.do != "numbers":
            raise UserError("--wait has an effect with --do numbers alone; add it, or drop --wait")
        from selfforcing_dfd.protocol.prepared import prepare
        from selfforcing_dfd.protocol.report import write_report
        from selfforcing_dfd.protocol.work import Worker, run_tasks

        prepared = prepare(args.plan)
        unknown = sorted(set(args.only) - set(prepared.protocol.methods))
        if unknown:
            known = ", ".join(prepared.protocol.methods)
            raise UserError(f"--only names {', '.join(unknown)}; the methods are {known}")
        failures: list[str] = []
        if args.do != "report":
            tasks = Worker(prepared, args.device).tasks(args.do, args.only)
            failures = run_tasks(tasks, args.wait)
        if args.do != "videos":
            print(write_report(prepared))
        if failures:
            count = len(failures)
            raise UserError(f"{count} results failed, the first: {failures[0]}")

    return run


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "plan", metavar="NAME", help="a protocol in configs/protocol, such as tiny, or a YAML file"
    )
    parser.add_argument(
        "--do",
        choices=DO,
        default="all",
        help="videos: make them; numbers: measure those that are there; report: write it from what "
        "is measured so far (default: %(default)s, one after the other)",
    )
    parser.add_argument(
        "--wait",
        action="store_true",
        help="with --do numbers: wait until another process has made all videos",
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="METHOD", help="make and measure these alone"
    )
    parser.add_argument("--device", default="auto", help=DEVICE_HELP)
