"""The command `study`."""

from __future__ import annotations

import argparse

from selfforcing_dfd.cli.options import Run, positive
from selfforcing_dfd.common import UserError


def study(parser: argparse.ArgumentParser) -> Run:
    """Run a study: many arms from several starts, measured along their way, and write its page.

    What is there already is kept, so the same command goes on after a stop. Several processes, on
    one machine or on several that share the folder, may run it at once. Plans lie in
    configs/study: quick (one start, one draw), main, screening (many arms once), and for the rows
    of the paper baselines, ablations, looseness, i2v, i2v_whole, t2v, t2v_collapsed and
    t2v_teacher.
    """
    parser.add_argument(
        "--plan",
        required=True,
        metavar="NAME",
        help="a plan in configs/study, such as main or quick, or a YAML file",
    )
    parser.add_argument(
        "--jobs",
        type=positive,
        default=1,
        metavar="N",
        help="processes that share the work, one thread each (default: %(default)s)",
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="ARM", help="train and measure these arms alone"
    )
    parser.add_argument(
        "--measure-only", action="store_true", help="measure what is trained, train nothing"
    )
    parser.add_argument(
        "--tables-only",
        action="store_true",
        help="write the page and the plots from the numbers that are there",
    )
    parser.add_argument(
        "--starts",
        action="store_true",
        help="make the starts that are missing, as the plan says, and stop (minutes to hours)",
    )
    parser.add_argument(
        "--known",
        action="store_true",
        help="take the runs that the page's numbers hold, where settings, weights and clips are "
        "the same, and make only the others",
    )

    def run(args: argparse.Namespace) -> None:
        if args.tables_only and (args.only or args.measure_only or args.known):
            raise UserError(
                "--tables-only measures nothing; drop --only, --measure-only and --known"
            )
        if args.starts and (args.tables_only or args.only or args.measure_only or args.known):
            raise UserError("--starts only makes starts; drop the other options")
        from selfforcing_dfd.study.report import take_from_page, write_study
        from selfforcing_dfd.study.starts import make_starts
        from selfforcing_dfd.study.work import run_study

        if args.starts:
            for line in make_starts(args.plan):
                print(line)
            return
        failure = ""
        if not args.tables_only:
            if args.known:
                for line in take_from_page(args.plan):
                    print(line)
            failure = run_study(args.plan, args.only, args.jobs, args.measure_only)
        print(write_study(args.plan))
        if failure:
            raise UserError(failure)

    return run
