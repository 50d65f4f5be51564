"""The steps of `curate` after captions: embed, cluster, pick, pack."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from selfforcing_dfd.cli.curate_options import (
    add_candidate_options,
    add_feature_options,
    add_folder,
    add_gate_options,
    add_overwrite,
    add_set_option,
    intake_of,
    section_of,
)
from selfforcing_dfd.cli.data_commands import (
    captions_named,
    file_source,
    pack_files,
    print_summary,
    set_codec_defaults,
)
from selfforcing_dfd.cli.data_options import (
    CODEC_FILE,
    PACK_HERE,
    add_caption_options,
    add_codec_options,
    add_engine_options,
    add_form_options,
    add_intake_options,
    add_output_options,
    add_text_options,
    engine_of,
)
from selfforcing_dfd.cli.options import DEVICE_HELP, Command, Run, positive
from selfforcing_dfd.common import find_device

if TYPE_CHECKING:
    from selfforcing_dfd.curate.assemble import TrainingSet
    from selfforcing_dfd.curate.folder import Clusters, Embedded
    from selfforcing_dfd.curate.intake import Intake
    from selfforcing_dfd.data.sources.listing import Clip

MODEL_FRAMES = 81
NUM_PRINTED = 20
MOST_PROCESSES = 8  # where nobody says how many: each may hold a model


def own_processes() -> int:
    """Of this machine, where nobody says how many."""
    return min(len(os.sched_getaffinity(0)), MOST_PROCESSES)


def embed(parser: argparse.ArgumentParser) -> Run:
    """Turn each clip into a feature vector, of a few of its frames.

    The vectors lie in a curation folder, where the next steps find them.
    """
    parser.add_argument(
        "source", type=Path, metavar="SOURCE", help="folder of videos, or a list as for `pack`"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="the curation folder (default: SOURCE-curation)"
    )
    add_intake_options(parser, MODEL_FRAMES)
    add_set_option(parser)
    add_feature_options(parser)
    parser.add_argument("--device", default="cpu", help=f"of CLIP and DINO: {DEVICE_HELP}")
    add_engine_options(parser, "one a core, 8 at most")
    add_overwrite(parser, "the features")

    def run(args: argparse.Namespace) -> None:
        from selfforcing_dfd.curate.embed import embed_clips

        intake = intake_of(args)
        source = intake.source
        name = source.name if source.is_dir() else source.stem
        embedded = embed_clips(
            intake,
            intake.clips(args.processes or own_processes()),
            args.out or source.with_name(f"{name}-curation"),
            section_of(args, "embed", "features", "pictures"),
            device=str(find_device(args.device, "--device")),
            engine=engine_of(args, own_processes()),
            overwrite=args.overwrite,
        )
        print_features(embedded)

    return run


def cluster(parser: argparse.ArgumentParser) -> Run:
    """Group clips with similar vectors, by k-means."""
    add_folder(parser)
    add_set_option(parser)
    parser.add_argument("--clusters", type=positive, metavar="K", help="how many (default: 1000)")
    parser.add_argument("--iterations", type=positive, metavar="N", help="at most (default: 50)")
    parser.add_argument("--seed", type=int, help="of the first centres (default: 0)")
    parser.add_argument("--device", default="cpu", help=f"of distances: {DEVICE_HELP}")
    add_overwrite(parser, "the clusters")

    def run(args: argparse.Namespace) -> None:
        from selfforcing_dfd.curate.cluster import cluster_clips
        from selfforcing_dfd.curate.folder import read_embedded

        clusters = cluster_clips(
            read_embedded(args.folder),
            section_of(args, "cluster", "clusters", "iterations", "seed"),
            device=find_device(args.device, "--device"),
            overwrite=args.overwrite,
        )
        print_clusters(args.folder, clusters)

    return run


def pick(parser: argparse.ArgumentParser) -> Run:
    """Draw a contact sheet of each cluster, and a table to write picks into.

    Look at FOLDER/sheets and write numbers of candidates into the column `picks` of
    FOLDER/picks.csv, such as 0,3,17. A cluster without picks is dropped.
    """
    add_folder(parser)
    add_set_option(parser)
    add_candidate_options(parser)
    add_engine_options(parser, "one a core, 8 at most")
    add_overwrite(parser, "the picks, which may be somebody's work")

    def run(args: argparse.Namespace) -> None:
        from selfforcing_dfd.curate.fiftyone import write_dataset
        from selfforcing_dfd.curate.folder import PICKS, read_clusters, read_embedded
        from selfforcing_dfd.curate.pick import show_clusters
        from selfforcing_dfd.curate.picks import read_picks

        embedded = read_embedded(args.folder)
        settings = section_of(args, "pick", "candidates", "pictures", "picks")
        sheets = show_clusters(
            embedded,
            read_clusters(embedded),
            settings,
            engine=engine_of(args, own_processes()),
            overwrite=args.overwrite,
        )
        if args.fiftyone is not None:
            picks = read_picks(args.folder / PICKS, sheets) if settings.picks else {}
            write_dataset(args.fiftyone, embedded, sheets, picks)
        candidates = sum(len(sheet.candidates) for sheet in sheets)
        print(f"{args.folder}: {len(sheets)} sheets of {candidates} candidates")
        print(f"next: write numbers into {args.folder / PICKS}, then curate pack")

    return run


def pack(parser: argparse.ArgumentParser) -> Run:
    """Choose the set by its picks, and encode it into webdataset shards.

    Each pick brings the clips that are most like it, until the quota is met. Clips whose captions
    are those of evaluation prompts stay out.
    """
    add_folder(parser)
    add_set_option(parser)
    add_gate_options(parser)
    add_codec_options(parser)
    add_caption_options(parser)
    add_form_options(parser)
    add_engine_options(parser, PACK_HERE)
    add_text_options(parser, "default: umt5 with --codec wan, tiny with tiny")
    add_output_options(parser, resumes=True)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where the shards go (default: FOLDER-shards)"
    )

    def run(args: argparse.Namespace) -> None:
        from selfforcing_dfd.curate.folder import read_embedded

        pack_set(args, read_embedded(args.folder))

    return run


SET_STEPS: Sequence[Command] = (embed, cluster, pick, pack)


def pack_set(args: argparse.Namespace, embedded: Embedded) -> None:
    """Choose the set and pack it."""
    args = as_for_pack(args, embedded.intake)
    set_codec_defaults(args)
    training = assembled(args, embedded)
    print_set(training)
    source = file_source(args, training.names)
    out = args.out or args.folder.resolve().with_name(f"{args.folder.resolve().name}-shards")
    record = {"curation": str(training.record["sha256"])}
    summary = pack_files(args, source, out, record, training.write)
    print_summary(summary, f", {CODEC_FILE}" if args.codec == "tiny" else "")


def as_for_pack(args: argparse.Namespace, intake: Intake) -> argparse.Namespace:
    """The options of the command `pack` for clips that are taken as they were embedded."""
    more = {
        "source": intake.source,
        "recursive": intake.recursive,
        "fps": intake.fps,
        "frames": intake.num_frames,
        "cut": "",
        "part": (1, 1),
        "resume": not args.overwrite,
    }
    return argparse.Namespace(**vars(args), **more)


def assembled(args: argparse.Namespace, embedded: Embedded) -> TrainingSet:
    """The set that options and picks ask for."""
    from selfforcing_dfd.curate.assemble import assemble
    from selfforcing_dfd.data.sources.prompts import read_prompts

    prompts = [prompt for path in args.prompts for _, prompt in read_prompts(path)]
    held_out = [] if args.held_out is None else [name for _, name in read_prompts(args.held_out)]
    settings = section_of(args, "pack", "quota", "duplicate", "near")
    return assemble(embedded, captioned(args, embedded), settings, prompts, held_out)


def captioned(args: argparse.Namespace, embedded: Embedded) -> list[Clip]:
    """All clips of the folder with the captions that will be packed."""
    from selfforcing_dfd.data.sources.listing import chosen_clips, list_clips

    suffix, captions = captions_named(args.captions)
    listed = list_clips(args.source, suffix, captions, args.recursive, args.levels)
    return chosen_clips(listed, embedded.names)


def print_features(embedded: Embedded) -> None:
    print_named(embedded.problems, f"{embedded.folder / 'clips.jsonl'} states a `problem` for each")
    left_out = len(embedded.problems)
    total = len(embedded.names)
    print(f"{total} offered = {total - left_out} embedded + {left_out} left out")
    folder = embedded.folder
    dim = embedded.about["dim"]
    print(f"{folder}: {dim} numbers a clip; next, selfforcing-dfd curate cluster {folder}")


def print_named(reasons: Mapping[str, str], where: str) -> None:
    """The first few of what was left out."""
    for name, reason in list(reasons.items())[:NUM_PRINTED]:
        print(f"left out {name}: {reason}")
    rest = len(reasons) - NUM_PRINTED
    if rest > 0:
        print(f"left out {rest} more; {where}")


def print_clusters(folder: Path, clusters: Clusters) -> None:
    about = clusters.about
    sizes = sorted(about["sizes"])
    first = about["objectives"][0]
    last = about["objectives"][-1]
    how = "converged" if about["converged"] else "stopped"
    print(
        f"{how} after {about['iterations']} iterations; sum of squared distances {first:.6g} -> "
        f"{last:.6g}"
    )
    print(f"sizes: {sizes[0]} to {sizes[-1]}, median {sizes[len(sizes) // 2]}")
    if about["refilled"]:
        print(f"{about['refilled']} times a centre without clips was moved to a far clip")
    empty = sizes.count(0)
    if empty:
        print(f"{empty} clusters are empty: there are fewer different clips than clusters")
    print(f"{folder}: {about['clusters']} clusters; next, selfforcing-dfd curate pick {folder}")


def print_set(training: TrainingSet) -> None:
    for one in training.dropped[:NUM_PRINTED]:
        print(f"not taken, though picked: {one.clip}: {one.why}")
    for reason, count in training.reasons.most_common():
        print(f"{count} clips may not be in the set: {reason}")
    picked = training.num_picked
    total = len(training.chosen)
    print(f"{total} clips = {picked} picks + {total - picked} most like them")
