"""Commands of `python -m selfforcing_dfd` that need trained weights: invert, sample, report, rebuild."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path

Run = Callable[[argparse.Namespace], None]

STAGES: tuple[tuple[str, dict[str, str]], ...] = (  # config, and which of its exported files become which asset
    ("tiny/teacher.yaml", {"student": "teacher"}),
    ("tiny/teacher_long.yaml", {"student": "teacher"}),  # goes on from the one before
    ("tiny/init.yaml", {}),
    ("tiny/dmd.yaml", {"student": "student", "fake": "fake"}),
)
NUM_BASIS_CLIPS = 1024


def invert(parser: argparse.ArgumentParser) -> Run:
    """Store with every sample the noise to which the teacher's ODE maps it, for the pairing `inversion`."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="shards with their index.json; replaced as a whole")
    parser.add_argument("--config", required=True, help="names the teacher: its model section and weights.teacher")
    parser.add_argument("--steps", type=int, default=12, help="of the ODE solver, two network calls each (default: 12)")

    def run(args: argparse.Namespace) -> None:
        from selfforcing_dfd.build import build_invert, load_network
        from selfforcing_dfd.config import load_config
        from selfforcing_dfd.data.pack import add_noise
        from selfforcing_dfd.training.ema import model_fingerprint

        config = load_config(args.config)
        teacher = model_fingerprint(load_network(config.model, config.weights.teacher))
        fingerprint = f"{teacher}-{args.steps}"
        summary = add_noise(args.folder, build_invert(config, args.steps), noise_fingerprint=fingerprint)
        print(f"{summary.folder}: {summary.num_samples} samples now have their noise")

    return run


def sample(parser: argparse.ArgumentParser) -> Run:
    """Write a video of clips that a trained student generates."""
    parser.add_argument("--run", dest="folder", type=Path, required=True, metavar="DIR", help="a run's folder")
    parser.add_argument("--prompt", action="append", default=[], help="caption of a clip; may be given several times")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the mp4 to write (default: DIR/sample.mp4)")

    def run(args: argparse.Namespace) -> None:
        from selfforcing_dfd.tiny.report import sample_videos

        print(f"wrote {sample_videos(args.folder, args.prompt, args.out)}")

    return run


def report(parser: argparse.ArgumentParser) -> Run:
    """Put the reports of several seeds of one comparison together."""
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="run folders with a report.json each")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the common report goes")

    def run(args: argparse.Namespace) -> None:
        from selfforcing_dfd.tiny.report import combine

        print(combine(args.folders, args.out))

    return run


def rebuild(parser: argparse.ArgumentParser) -> Run:
    """Make assets/tiny: codec (where it is missing), teacher, causal student, DMD student. Hours of CPU; resumable."""
    parser.add_argument("--out", default="runs", metavar="DIR", help="where the runs go (default: runs)")

    def run(args: argparse.Namespace) -> None:
        from selfforcing_dfd import rng
        from selfforcing_dfd.build import run_folder
        from selfforcing_dfd.config import REPOSITORY, load_config
        from selfforcing_dfd.runner import run as train
        from selfforcing_dfd.tiny.codec import TinyCodec
        from selfforcing_dfd.tiny.world import draw_factors, render

        assets = REPOSITORY / "assets" / "tiny"
        assets.mkdir(parents=True, exist_ok=True)
        basis = assets / "codec.safetensors"
        if not basis.exists():
            TinyCodec.fit(render(draw_factors(NUM_BASIS_CLIPS, rng.generator(0, "codec")))).save(basis)
        for name, exported in STAGES:
            config = load_config(name, [f"run.out={args.out}"])
            train(config, resume=True)
            for role, asset in exported.items():
                shutil.copyfile(run_folder(config) / f"{role}.safetensors", assets / f"{asset}.safetensors")

    return run


COMMANDS = (invert, sample, report, rebuild)
