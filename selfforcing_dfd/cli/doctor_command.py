"""Commands that say what lies somewhere and whether it is whole: inspect, verify, doctor."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from selfforcing_dfd.cli.options import Run
from selfforcing_dfd.common import UserError

if TYPE_CHECKING:
    from selfforcing_dfd.training.doctor import Finding

META_FILE = "meta.json"
INDEX_FILE = "index.json"


def doctor(parser: argparse.ArgumentParser) -> Run:
    """Say in plain words what is wrong with a run's folder; with --mend, mend what can be mended.

    Nothing is lost by it: what cannot be used is renamed to damaged-NAME, and only leftovers of
    writes that were killed are deleted.
    """
    parser.add_argument(
        "folder", type=Path, metavar="RUN", help="folder of a run, or of a comparison with arms"
    )
    parser.add_argument("--mend", action="store_true", help="mend what can be mended")

    def run(args: argparse.Namespace) -> None:
        from contextlib import nullcontext

        from selfforcing_dfd.training.doctor import examine, summary
        from selfforcing_dfd.training.exclusive import lock_folders

        num_left = 0
        for folder in runs_in(args.folder):
            print("\n  ".join([f"{folder}:", *summary(folder)]))
            with lock_folders(folder) if args.mend else nullcontext():
                findings = examine(folder, is_held=args.mend)
                for finding in findings:
                    num_left += not treat(finding, args.mend)
            if not findings:
                print("  nothing is wrong")
        if num_left:
            things = "1 thing is" if num_left == 1 else f"{num_left} things are"
            more = "" if args.mend else "; --mend mends what is marked `to mend`"
            raise UserError(f"{things} wrong with {args.folder}{more}")

    return run


def treat(finding: Finding, mend: bool) -> bool:
    """Print a finding, and mend it if that is asked for and can be; whether it was mended."""
    indented = finding.problem.replace("\n", "\n  ")
    print(f"  WRONG: {indented}")
    if finding.mend is None:
        print(f"    what helps: {finding.cure}")
    elif mend:
        finding.mend()
        print(f"    mended: {finding.cure}")
    else:
        print(f"    to mend: {finding.cure}")
    return mend and finding.mend is not None


def runs_in(folder: Path) -> list[Path]:
    """The folder itself if a run is in it, else its arms. Raises UserError for neither."""
    from selfforcing_dfd.training.doctor import is_run

    found = [folder] if is_run(folder) else []
    if not found and folder.is_dir():
        found = [path for path in sorted(folder.iterdir()) if path.is_dir() and is_run(path)]
    if not found:
        raise UserError(
            f"{folder} is no run's folder: it has neither run.json nor checkpoints nor metrics; "
            "name the folder that training wrote, such as runs/dfd_ar"
        )
    return found


def folder_or_address(text: str) -> Path | str:
    """A path, or the text where it is an address: a path would lose one of its slashes."""
    return text if "://" in text else Path(text)


def verify(parser: argparse.ArgumentParser) -> Run:
    """Read everything in a folder of shards, a run or a checkpoint, and compare all checksums."""
    parser.add_argument(
        "folder",
        type=folder_or_address,
        metavar="FOLDER",
        help="shards with their index.json, which may be an address such as s3://bucket/folder, a "
        "run, or one of its checkpoints",
    )

    def run(args: argparse.Namespace) -> None:
        if isinstance(args.folder, str):
            print(verified_shards(args.folder))
        elif (args.folder / META_FILE).is_file():
            print(verified_checkpoint(args.folder))
        elif (args.folder / INDEX_FILE).is_file() or not args.folder.is_dir():
            print(verified_shards(args.folder))
        else:
            print(verified_runs(args.folder))

    return run


def verified_shards(folder: Path | str) -> str:
    """One line about whole shards. Raises ShardError."""
    from selfforcing_dfd.data.shards import ShardReader

    reader = ShardReader(folder)
    reader.verify()
    levels = f" with {', '.join(reader.levels)} captions" if reader.levels else ""
    counts = f"{len(reader)} samples{levels} in {len(reader.index.shards)} shards"
    return f"{folder}: {counts}, as packed"


def verified_checkpoint(folder: Path) -> str:
    """One line about a whole checkpoint. Raises CheckpointError."""
    from selfforcing_dfd.weights.checkpoint_files import CheckpointError, deep_damage, read_meta

    meta = read_meta(folder)
    problem = deep_damage(folder)
    if problem is not None:
        raise CheckpointError(f"{folder} is damaged: {problem}; use the checkpoint before it")
    return (
        f"{folder}: student update {meta['student_update']}, {len(meta['files'])} files, as "
        "written, all values finite"
    )


def verified_runs(folder: Path) -> str:
    """A line about each whole run in a folder. Raises UserError with all that is wrong."""
    from selfforcing_dfd.training.doctor import examine

    runs = runs_in(folder)
    problems = [finding.problem for run in runs for finding in examine(run)]
    if problems:
        raise UserError(f"{'; '.join(problems)}; `selfforcing-dfd doctor {folder}` says what helps")
    return "\n".join(f"{run}: record, checkpoints, metrics and results as written" for run in runs)


def inspect(parser: argparse.ArgumentParser) -> Run:
    """Say what weights, a checkpoint or a run are: sizes, role, recipe, training."""
    parser.add_argument(
        "source",
        type=Path,
        metavar="SRC",
        help="weights in any format, a training checkpoint, or a run's folder",
    )
    parser.add_argument(
        "--entry", default="", metavar="NAME", help="model of a file that holds several"
    )
    parser.add_argument(
        "--head-dim",
        type=int,
        default=0,
        metavar="N",
        help="values of an attention head, where SRC does not state them (default: Wan's 128)",
    )

    def run(args: argparse.Namespace) -> None:
        from selfforcing_dfd.training.doctor import is_run, summary

        if args.source.is_dir() and is_run(args.source):
            lines = [f"run {args.source}", *(f"  {line}" for line in summary(args.source))]
        else:
            lines = list(described(args.source, args.entry, args.head_dim))
        print("\n".join(lines))

    return run


def described(source: Path, entry: str, head_dim: int) -> Iterator[str]:
    """What a file or folder of weights says of itself. Raises WeightsError."""
    from selfforcing_dfd.weights.read import describe

    found = describe(source, entry, head_dim)
    yield f"{found.source}: {found.format}"
    yield f"  {'role':<12}{found.role or 'not stated'}"
    yield f"  {'parameters':<12}{found.num_parameters:,}"
    others = ", ".join(found.entries[1:])
    if others:
        yield f"  {'also there':<12}{others} (--entry NAME)"
    yield f"  {'sizes':<12}" + ", ".join(f"{name} {size}" for name, size in found.sizes.items())
    if found.recipe is not None:
        yield f"  {'recipe':<12}{found.recipe}"
    if found.data is not None:
        yield f"  {'data':<12}{found.data}"
    if (source / META_FILE).is_file():
        yield from described_training(source)


def described_training(checkpoint: Path) -> Iterator[str]:
    """How far a checkpoint's run was, and what wrote it."""
    from selfforcing_dfd.weights.checkpoint_files import read_meta

    meta = read_meta(checkpoint)
    clock = {key: value for key, value in meta["values"].items() if key.startswith("clock.")}
    counts = ", ".join(f"{key.removeprefix('clock.')} {value:,}" for key, value in clock.items())
    yield f"  {'training':<12}{counts or meta['student_update']}"
    num_bytes = sum(entry["size_bytes"] for entry in meta["files"].values())
    yield f"  {'files':<12}{len(meta['files'])}, {num_bytes / 1e6:,.1f} MB"
    yield f"  {'written by':<12}" + ", ".join(f"{k} {v}" for k, v in meta["versions"].items())
    seal = meta.get("sha256", "none: an older version wrote it")
    yield f"  {'SHA-256':<12}{seal} (of all of it; `selfforcing-dfd verify` compares)"
