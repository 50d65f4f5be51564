"""The command `blind`: a page of pairs for people, and what they chose."""

from __future__ import annotations

import argparse
from pathlib import Path

from selfforcing_dfd.cli.options import Command, Run, positive
from selfforcing_dfd.common import UserError


def blind(parser: argparse.ArgumentParser) -> Run:
    """Compare two methods by eye: `blind page` writes the pairs, `blind count` reads the votes.

    Each step has options of its own: selfforcing-dfd blind STEP --help.
    """
    parser.add_argument("step", choices=sorted(STEPS), help="what to do")

    def run(args: argparse.Namespace) -> None:
        raise UserError(f"name the step first: selfforcing-dfd blind {args.step} ...")

    return run


def page(parser: argparse.ArgumentParser) -> Run:
    """Write a page that shows two methods of a protocol side by side, at random sides.

    The folder can be sent to people or put on any web server. It does not say which side is which:
    that stands in the key beside it, which stays here.
    """
    parser.add_argument("plan", metavar="NAME", help="a protocol whose videos are made")
    parser.add_argument("methods", nargs=2, metavar="METHOD", help="two methods of it")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="the folder of the page (default: in the protocol's)",
    )
    parser.add_argument(
        "--pairs", type=positive, default=0, metavar="N", help="how many (default: all)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the order and the sides (default: %(default)s)"
    )

    def run(args: argparse.Namespace) -> None:
        from selfforcing_dfd.protocol.blind import PAGE, write_page
        from selfforcing_dfd.protocol.prepared import prepare

        prepared = prepare(args.plan)
        one, other = args.methods
        out = args.out or prepared.folder.root / f"blind-{one}-{other}"
        key = write_page(prepared, (one, other), out, args.seed, args.pairs)
        print(f"{out / PAGE}: give people this folder\n{key}: keep this to yourself")

    return run


def count(parser: argparse.ArgumentParser) -> Run:
    """Read what people chose, and say which method they prefer, with a sign test over pairs."""
    parser.add_argument(
        "results", nargs="+", type=Path, metavar="CSV", help="files that the page gave people"
    )
    parser.add_argument("--key", type=Path, required=True, metavar="FILE", help="of that page")

    def run(args: argparse.Namespace) -> None:
        from selfforcing_dfd.protocol.blind import count_votes, in_words

        if not args.key.is_file():
            raise UserError(f"{args.key} does not exist; name the key that `blind page` wrote")
        print(in_words(count_votes(args.results, args.key)))

    return run


STEPS: dict[str, Command] = {"page": page, "count": count}
