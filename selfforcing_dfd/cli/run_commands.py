"""Commands around runs: train, sample, report, rebuild."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from selfforcing_dfd.cli.options import Run, add_decoder_options, positive
from selfforcing_dfd.common import UserError, shipped

TO_COLLAPSE = ["optim.student.lr=2.0e-4"]  # a student that has lost modes
# config, settings, and which of its exported files become which asset
STAGES: tuple[tuple[str, list[str], dict[str, str]], ...] = (
    ("tiny/teacher.yaml", [], {"student": "teacher"}),
    ("tiny/teacher_long.yaml", [], {"student": "teacher"}),  # continues the run before
    ("tiny/teacher_all.yaml", [], {"student": "teacher"}),  # and so does this
    ("tiny/causal.yaml", [], {"student": "causal"}),
    ("tiny/init.yaml", [], {"student": "init"}),
    ("tiny/dmd.yaml", TO_COLLAPSE, {"student": "student", "fake": "fake"}),
    ("tiny/stable.yaml", [], {"student": "stable"}),
    ("tiny/decoder.yaml", [], {"student": "decoder"}),
)
NUM_BASIS_CLIPS = 1024


def train(parser: argparse.ArgumentParser) -> Run:
    """Train one stage (teacher, pairs, init, dmd, dfd), or all arms of a comparison.

    Settings come from a config file; `optim.student.lr=1e-5 run.seed=1` after it change single
    ones.
    """
    parser.add_argument(
        "--config",
        required=True,
        help="YAML file; a name such as dfd_ar or tiny/dmd is looked up in configs/",
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
        type=positive,
        metavar="N",
        help="with --dry-run: GPUs to plan for; the same as run.gpus=N",
    )
    parser.add_argument(
        "--as-published",
        action="store_true",
        help="deviate from the papers as the public code does; the same as published.NAME=true "
        "for each of them (docs/differences.md)",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.setting=value",
        help="settings that replace the file's",
    )

    def run(args: argparse.Namespace) -> None:
        from selfforcing_dfd.cli.train import run
        from selfforcing_dfd.processes.failure import ending_together
        from selfforcing_dfd.stages import load_as_published, load_config
        from selfforcing_dfd.training.plan import plan

        gpus = [] if args.gpus is None else [f"run.gpus={args.gpus}"]
        load = load_as_published if args.as_published else load_config
        with ending_together():
            config = load(args.config, [*args.overrides, *gpus])
            if args.dry_run:
                print(plan(config))
            else:
                run(config, args.resume)

    return run


def sample(parser: argparse.ArgumentParser) -> Run:
    """Write a video of clips that a trained student generates."""
    parser.add_argument(
        "--run",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of a finished run, or of one of its arms",
    )
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="caption of a clip; may be given several times",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the mp4 to write (default: DIR/sample.mp4)"
    )
    add_decoder_options(parser)

    def run(args: argparse.Namespace) -> None:
        from selfforcing_dfd.evaluation.report import sample_videos
        from selfforcing_dfd.evaluation.small_decode import SmallDecode

        small = SmallDecode.asked(args.run, args.decoder, args.decoder_weights)
        print(f"wrote {sample_videos(args.run, args.prompt, args.out, small)}")
        if small is not None:
            print(f"small decoder {small.decoder.source}: {small.comparison.result()}")

    return run


def report(parser: argparse.ArgumentParser) -> Run:
    """Join the reports of several runs of one comparison, and judge over them."""
    parser.add_argument(
        "folders",
        nargs="+",
        type=Path,
        metavar="DIR",
        help="folders of finished runs, of other seeds or starts, two at least",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where the common report goes"
    )

    def run(args: argparse.Namespace) -> None:
        if len(args.folders) == 1:
            (folder,) = args.folders
            raise UserError(
                f"report joins two runs or more, but {folder} is one; train another "
                f"with run.seed=1 run.name=seed1. The report of one run is {folder}/report.html"
            )
        from selfforcing_dfd.evaluation.report import combine

        print(combine(args.folders, args.out))

    return run


def picture(parser: argparse.ArgumentParser) -> Run:
    """Show rows of a run's report in one picture: moving clips (.gif, .webp) or scores (.svg)."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of a finished run")
    parser.add_argument(
        "--rows",
        nargs="+",
        required=True,
        metavar="NAME[=LABEL]",
        help="rows of the report, such as data, start or an arm, and the label to show for each",
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        default=[],
        metavar="KEY",
        help="scores of report.json to plot (default: all)",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the picture to write"
    )

    def run(args: argparse.Namespace) -> None:
        from selfforcing_dfd.evaluation.showcase import write_showcase

        labels = {}
        for row in args.rows:
            name, _, label = row.partition("=")
            labels[name] = label or name
        write_showcase(args.folder, args.out, labels, args.metrics)
        print(f"wrote {args.out}")

    return run


def rebuild(parser: argparse.ArgumentParser) -> Run:
    """Train assets/tiny again: codec, teachers, students, small decoder. Hours; resumable."""
    parser.add_argument(
        "--out", default="runs", metavar="DIR", help="where the runs go (default: %(default)s)"
    )

    def run(args: argparse.Namespace) -> None:
        from selfforcing_dfd.cli.train import run as train
        from selfforcing_dfd.stages import load_config
        from selfforcing_dfd.training.folders import run_folder

        assets = shipped("assets/tiny")
        assets.mkdir(parents=True, exist_ok=True)
        basis = assets / "codec.safetensors"
        if not basis.exists():
            fit_basis(basis)
        for name, settings, exported in STAGES:
            config = load_config(name, [f"run.out={args.out}", *settings])
            train(config, resume=True)
            for role, asset in exported.items():
                trained = run_folder(config) / f"{role}.safetensors"
                shutil.copyfile(trained, assets / f"{asset}.safetensors")

    return run


def fit_basis(path: Path) -> None:
    """Fit the tiny codec to clips of the tiny world and save it."""
    from selfforcing_dfd import rng
    from selfforcing_dfd.tiny.codec import TinyCodec
    from selfforcing_dfd.tiny.world import draw_factors, render

    factors = draw_factors(NUM_BASIS_CLIPS, rng.generator(0, "codec"))
    TinyCodec.fit(render(factors)).save(path)
