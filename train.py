"""Distil a few-step autoregressive video generator: `python train.py --config dfd_ar.yaml`."""

from __future__ import annotations

import argparse
import sys


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train one stage (teacher, pairs, init, dmd, dfd), or all arms of a comparison, from a config file.",
        epilog="Overrides change single settings: train.py --config dfd_ar.yaml optim.student.lr=1e-5 run.seed=1",
    )
    parser.add_argument(
        "--config", required=True, help="YAML file; a bare name is looked up in configs/"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue from the newest complete checkpoint of this run",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print what would be done, what it needs and what it costs",
    )
    parser.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="with --dry-run: GPUs to plan for; the same as run.gpus=N",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.setting=value",
        help="settings that replace the file's",
    )
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    from selfforcing_dfd.common import tune_allocator

    tune_allocator()
    from selfforcing_dfd.cli.train import USER_ERRORS, Interrupted, run
    from selfforcing_dfd.config import load_config
    from selfforcing_dfd.training.plan import plan

    try:
        gpus = [] if options.gpus is None else [f"run.gpus={options.gpus}"]
        config = load_config(options.config, [*options.overrides, *gpus])
        if options.dry_run:
            print(plan(config))
        else:
            run(config, options.resume)
    except Interrupted as stop:
        print(f"\n{stop}", file=sys.stderr)
        return 130
    except USER_ERRORS as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
