"""Commands of `python -m selfforcing_dfd` that need trained weights: invert, sample, report,
rebuild, convert.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path

Run = Callable[[argparse.Namespace], None]

# config, and which of its exported files become which asset
STAGES: tuple[tuple[str, dict[str, str]], ...] = (
    ("tiny/teacher.yaml", {"student": "teacher"}),
    ("tiny/teacher_long.yaml", {"student": "teacher"}),  # goes on from the one before
    ("tiny/init.yaml", {}),
    ("tiny/dmd.yaml", {"student": "student", "fake": "fake"}),
)
NUM_BASIS_CLIPS = 1024


def invert(parser: argparse.ArgumentParser) -> Run:
    """Store with every sample the noise to which the teacher's ODE maps it, for the pairing
    `inversion`.
    """
    parser.add_argument(
        "folder",
        type=Path,
        metavar="FOLDER",
        help="shards with their index.json; replaced as a whole",
    )
    parser.add_argument(
        "--config", required=True, help="names the teacher: its model section and weights.teacher"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=12,
        help="of the ODE solver, two network calls each (default: 12)",
    )

    def run(args: argparse.Namespace) -> None:
        from selfforcing_dfd.config import load_config
        from selfforcing_dfd.data.noise import store_noise
        from selfforcing_dfd.training.build import build_invert, build_teacher
        from selfforcing_dfd.training.ema import model_fingerprint

        config = load_config(args.config)
        teacher = model_fingerprint(build_teacher(config))
        fingerprint = f"{teacher}-{args.steps}"
        summary = store_noise(
            args.folder, build_invert(config, args.steps), noise_fingerprint=fingerprint
        )
        print(f"{summary.folder}: {summary.num_samples} samples now have their noise")

    return run


def sample(parser: argparse.ArgumentParser) -> Run:
    """Write a video of clips that a trained student generates."""
    parser.add_argument(
        "--run", dest="folder", type=Path, required=True, metavar="DIR", help="a run's folder"
    )
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        help="caption of a clip; may be given several times",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the mp4 to write (default: DIR/sample.mp4)"
    )

    def run(args: argparse.Namespace) -> None:
        from selfforcing_dfd.evaluation.report import sample_videos

        print(f"wrote {sample_videos(args.folder, args.prompt, args.out)}")

    return run


def report(parser: argparse.ArgumentParser) -> Run:
    """Put the reports of several seeds of one comparison together."""
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="DIR", help="run folders with a report.json each"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where the common report goes"
    )

    def run(args: argparse.Namespace) -> None:
        from selfforcing_dfd.evaluation.report import combine

        print(combine(args.folders, args.out))

    return run


def rebuild(parser: argparse.ArgumentParser) -> Run:
    """Make assets/tiny: codec (where it is missing), teacher, causal student, DMD student. Hours of
    CPU; resumable.
    """
    parser.add_argument(
        "--out", default="runs", metavar="DIR", help="where the runs go (default: runs)"
    )

    def run(args: argparse.Namespace) -> None:
        from selfforcing_dfd import rng
        from selfforcing_dfd.cli.train import run as train
        from selfforcing_dfd.config import REPOSITORY, load_config
        from selfforcing_dfd.tiny.codec import TinyCodec
        from selfforcing_dfd.tiny.world import draw_factors, render
        from selfforcing_dfd.training.build import run_folder

        assets = REPOSITORY / "assets" / "tiny"
        assets.mkdir(parents=True, exist_ok=True)
        basis = assets / "codec.safetensors"
        if not basis.exists():
            TinyCodec.fit(render(draw_factors(NUM_BASIS_CLIPS, rng.generator(0, "codec")))).save(
                basis
            )
        for name, exported in STAGES:
            config = load_config(name, [f"run.out={args.out}"])
            train(config, resume=True)
            for role, asset in exported.items():
                shutil.copyfile(
                    run_folder(config) / f"{role}.safetensors", assets / f"{asset}.safetensors"
                )

    return run


def convert(parser: argparse.ArgumentParser) -> Run:
    """Turn a transformer's weights into another format, bit for bit: diffusers, original Wan,
    Self-Forcing, one file.
    """
    parser.add_argument(
        "source",
        type=Path,
        metavar="SRC",
        help="folder or file in any of these, or a training checkpoint",
    )
    parser.add_argument(
        "destination", type=Path, metavar="DST", help="folder (diffusers, wan) or file to write"
    )
    parser.add_argument(
        "--to", choices=("diffusers", "wan", "self-forcing", "single-file"), required=True
    )
    parser.add_argument(
        "--entry",
        default="",
        metavar="NAME",
        help="model of a file with several (default: generator_ema, generator, model or ema, the first that is there)",
    )
    kinds = ("keep", "float32", "bfloat16", "float16")
    parser.add_argument(
        "--dtype", choices=kinds, default="keep", help="of the tensors written (default: keep)"
    )
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of a folder's files (default: 5GB)"
    )
    parser.add_argument(
        "--role",
        choices=("student", "teacher"),
        help="what the weights are, where SRC does not tell",
    )
    parser.add_argument(
        "--head-dim", type=int, default=0, metavar="N", help="where SRC does not tell; Wan's is 128"
    )
    parser.add_argument(
        "--drop-gan-heads", action="store_true", help="leave a Self-Forcing critic's GAN heads out"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier export in the same place"
    )

    def run(args: argparse.Namespace) -> None:
        import torch

        from selfforcing_dfd.weights.write import convert, parse_bytes

        kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        done = convert(
            args.source,
            args.destination,
            args.to,
            entry=args.entry,
            dtype=kinds.get(args.dtype),
            max_shard_bytes=parse_bytes(args.max_shard_size),
            overwrite=args.overwrite,
            role=args.role or "unknown",
            head_dim=args.head_dim,
            drop_gan_heads=args.drop_gan_heads,
            progress=True,
        )
        others = f" (also there: {', '.join(done.entries[1:])})" if done.entries[1:] else ""
        print(
            f"read {done.kind} {done.source}{others}: {done.num_tensors} tensors, {done.num_parameters:,} parameters"
        )
        print(f"wrote {done.destination}: {done.num_bytes / 1e9:.2f} GB in {done.num_files} files")
        if done.role == "unknown":
            taken = (
                "which readers take for a bidirectional teacher"
                if done.destination.is_dir()
                else "nor does the export"
            )
            print(
                f"the source does not say whether it is a student or a teacher, {taken}; --role student notes it"
            )

    return run


def export(parser: argparse.ArgumentParser) -> Run:
    """Write a run's student as a diffusers pipeline that others can use, with a model card."""
    parser.add_argument(
        "folder", type=Path, metavar="RUN", help="folder of a finished run, or of one of its arms"
    )
    parser.add_argument("destination", type=Path, metavar="DST", help="folder to write")
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="DIR",
        help="diffusers folder of Wan2.1: VAE, text encoder, tokenizer",
    )
    kinds = ("float32", "bfloat16", "float16")
    parser.add_argument(
        "--dtype", choices=kinds, default="float32", help="of the weights (default: %(default)s)"
    )
    parser.add_argument(
        "--base-model", default="", metavar="NAME", help="what the model card names as the origin"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="write into a folder that is not empty"
    )

    def run(args: argparse.Namespace) -> None:
        import torch

        from selfforcing_dfd.cli.export_run import export_run

        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[
            args.dtype
        ]
        export_run(
            args.folder, args.model, args.destination, dtype, args.base_model, args.overwrite
        )
        print(
            f"wrote {args.destination}: python inference/stream.py --model {args.destination} --prompt '...'"
        )

    return run


COMMANDS = (invert, sample, report, rebuild, convert, export)
