"""What a config would do, without doing it: `train.py --dry-run`."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from omegaconf import OmegaConf

from selfforcing_dfd.common import find_device, shipped
from selfforcing_dfd.config import Config, find_file, to_yaml
from selfforcing_dfd.data.shards import INDEX_NAME, ShardReader
from selfforcing_dfd.training.build import arms, build_chunks, build_ladder, run_folder, sources
from selfforcing_dfd.training.build_data import NEED_NO_CLIPS, noise_wish
from selfforcing_dfd.training.estimate import (
    GPUS,
    MFU,
    Clip,
    Gpu,
    clip_of,
    estimate_memory,
    fake_flops,
    fewest_gpus,
    gpu_hours,
    role_parameters,
    run_flops,
    student_flops,
)

VAE_STRIDE = 8  # video pixels for each latent one, both codecs
TEXT_TOKENS = 512  # UMT5's padded length, while there are no shards to ask
UMT5_WIDTH = 4096
ENCODERS = "weights/Wan2.1-T2V-1.3B-Diffusers"  # VAE and text encoder; those of 14B are the same
DFD_DATA, DFD_FOLDER = "csusupergear/vipe_long_lmdb", "data/vipe_long_lmdb"
# of Self-Forcing: prompts are all that DMD needs
PROMPTS, PROMPT_FOLDER = "vidprom_filtered_extended.txt", "data"
TERA = 1e12
GIGA = 1e9

REPOSITORIES = {
    "Wan2.1-T2V-1.3B-Diffusers": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "Wan2.1-T2V-14B-Diffusers": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    "Wan2.1-T2V-1.3B": "Wan-AI/Wan2.1-T2V-1.3B",
    "Wan2.1-T2V-14B": "Wan-AI/Wan2.1-T2V-14B",
    "Self-Forcing": "gdhe17/Self-Forcing",
}
"""Hub repositories by the name of the folder that a config expects them in."""


def plan(config: Config) -> str:
    """For every run that the settings stand for: what is trained on what, what is missing, what it
    costs; then the settings.
    """
    runs = list(arms(config))
    lines = [f"{len(runs)} run{'s' * (len(runs) > 1)}"]
    costs: list[str] = []
    # the runs of a comparison share their data
    prompts_do = all(run.run.stage in NEED_NO_CLIPS for run in runs)
    for run in runs:
        cost = plan_cost(run)
        same = [
            f"  cost        as of the run before, of {run.run.gpus} GPU{'s' * (run.run.gpus > 1)}"
        ]
        lines += ["", *plan_run(run, prompts_do), *(same if cost == costs else cost)]
        costs = cost
    return "\n".join([*lines, "", "settings", to_yaml(config)])


def plan_run(config: Config, prompts_do: bool = False) -> list[str]:
    """A run's networks, data and updates, one line each. prompts_do: data without clips will do."""
    stage, batch, rollout = config.run.stage, config.batch, config.rollout
    parameters = ", ".join(f"{role} {count:,}" for role, count in role_parameters(config).items())
    (height, width), (text_tokens, _) = latent_size(config), text_shape(config)
    checkpointing = "on" if config.model.gradient_checkpointing else "off"
    lines = [
        f"{run_folder(config)}: stage {stage} on {find_device(config.run.device, 'run.device')}, seed {config.run.seed}",
        f"  parameters  {parameters}",
        f"  compute     {config.model.compute}, gradient checkpointing {checkpointing}",
        f"  latents     [{batch.micro}, {rollout.frames}, {config.model.channels}, {height}, {width}] in "
        f"{len(build_chunks(config))} chunks of {rollout.chunk_frames} latent frames; text [{text_tokens}, "
        f"{config.model.text_dim}]",
        f"  no caption  {describe_negative(config)}",
    ]
    if stage in ("dmd", "dfd"):
        ladder = ", ".join(f"{sigma:.4g}" for sigma in build_ladder(config))
        lines.append(f"  ladder      sigma {ladder}; teacher guided by {config.score.guidance:g}")
    if stage == "dfd":
        dfd = config.dfd
        lines.append(
            f"  data rows   p {dfd.p:g} a {dfd.granularity}, pairing {dfd.pairing}, sigma {dfd.sigma_range}"
        )
    return [*lines, *describe_updates(config), *describe_needs(config, prompts_do)]


def describe_updates(config: Config) -> Iterator[str]:
    batch, updates = config.batch, config.run.student_updates
    if config.run.stage == "pairs":
        pairs = config.pairs
        count = f"the first {pairs.num}" if pairs.num else "all"
        yield f"  pairs       of {count} captions, {pairs.steps} steps guided by {pairs.guidance:g}, into {pairs.out}"
        return
    fake = updates * config.score.fake_per_student if config.run.stage in ("dmd", "dfd") else 0
    passes = batch.size // batch.micro
    yield f"  updates     {updates} of the student, {fake} of the fake score, {batch.size} samples each in {passes} passes"
    yield f"  checkpoints every {config.checkpoint.every} student updates, the newest {config.checkpoint.keep} kept"


def describe_negative(config: Config) -> str:
    """Which text stands for no caption."""
    if not has_shards(config):
        return "the shards' negative prompt if they hold one, else zeros"
    return (
        "the negative prompt stored with the shards"
        if reader_of(config).negative is not None
        else "zeros"
    )


def describe_needs(config: Config, prompts_do: bool) -> Iterator[str]:
    """The files that a run starts from; for each that is not there, the command that fetches or
    makes it.
    """
    given: dict[tuple[str, str], list[str]] = {
        source: [] for source in sources(config).values() if source[0]
    }
    for role, (path, entry) in sources(config).items():
        if path:
            given[path, entry].append(role)
    for (path, entry), roles in given.items():
        there = find_file(path).exists()
        yield f"  {'start':<12}{' and '.join(roles)}: {path}{f' [{entry}]' if entry else ''}{'' if there else ' (MISSING)'}"
        if not there:
            yield f"{'':14}{how_to_get(path)}"
    if not given:
        yield f"  {'start':<12}nothing: fresh weights from run.seed"
    folder, tiny = config.data.shards, config.data.tiny
    if has_shards(config):
        yield f"  {'data':<12}{folder}, {len(reader_of(config))} samples"
    elif tiny.clips:
        yield f"  {'data':<12}{folder}, to be made from {tiny.clips} tiny-world clips with {tiny.level} captions"
    else:
        yield f"  {'data':<12}{folder} (MISSING)"
        yield from (f"{'':14}{command}" for command in how_to_make_shards(config, prompts_do))
    if (
        noise_wish(config)
        and not tiny.noise_steps
        and not (has_shards(config) and reader_of(config).has_noise)
    ):
        yield f"  {'noise':<12}not in {folder} (MISSING)"
        yield f"{'':14}python -m selfforcing_dfd invert {folder} --config CONFIG   # this one"


def how_to_get(path: str) -> str:
    """The command that fetches published weights, or trains what a shipped config exports."""
    parts = Path(path).parts
    for depth, part in enumerate(parts):
        if part in REPOSITORIES:
            wanted = [shlex.quote("/".join(parts[depth + 1 :]))] if depth + 1 < len(parts) else []
            folder = shlex.quote(str(Path(*parts[: depth + 1])))
            return " ".join(["hf download", REPOSITORIES[part], *wanted, "--local-dir", folder])
    maker = maker_of(str(Path(path).parent), "run")
    return (
        f"python train.py --config {maker}"
        if maker
        else "no shipped config makes it; correct the path"
    )


def how_to_make_shards(config: Config, prompts_do: bool) -> Iterator[str]:
    """The commands that write data.shards: a shipped config of stage pairs, or the packer, or the
    importer.
    """
    if maker := maker_of(config.data.shards, "pairs"):
        yield f"python train.py --config {maker}"
        return
    out, wan = f"--out {config.data.shards}", config.model.text_dim == UMT5_WIDTH
    size = "x".join(str(side) for side in config.data.video_size)
    models = f" --model {ENCODERS}" if wan else ""
    frames = f"--frames {1 + 4 * (config.rollout.frames - 1)} --size {size}"
    if wan and prompts_do:
        yield f"hf download {REPOSITORIES['Self-Forcing']} {PROMPTS} --local-dir {PROMPT_FOLDER}"
        yield f"python -m selfforcing_dfd prompts {PROMPT_FOLDER}/{PROMPTS}{models} {frames} {out}"
        yield f"or, from clips: python -m selfforcing_dfd pack CLIPS --codec wan{models} {frames} {out}"
        return
    yield f"python -m selfforcing_dfd pack CLIPS --codec {'wan' if wan else 'tiny'}{models} {frames} {out}"
    if wan:
        yield f"or, DFD's own: hf download {DFD_DATA} --repo-type dataset --local-dir {DFD_FOLDER}"
        yield f"               python -m selfforcing_dfd import {DFD_FOLDER}{models} {out}"


def maker_of(folder: str, what: str) -> str:
    """The shipped config whose run's folder (`run`) or pairs (`pairs`) this is; empty for none."""
    for path in sorted((shipped("configs")).rglob("*.yaml")):
        own = OmegaConf.to_container(OmegaConf.load(path))
        settings = own if isinstance(own, dict) else {}
        run, pairs = settings.get("run") or {}, settings.get("pairs") or {}
        made = (
            f"{run.get('out', 'runs')}/{run.get('name', '')}"
            if what == "run"
            else pairs.get("out", "")
        )
        if made == folder:
            return path.relative_to(shipped("configs")).as_posix()
    return ""


def plan_cost(config: Config) -> list[str]:
    """Memory of a GPU, operations of an update and GPU-hours, as a table."""
    clip, gpus = clip_of(config, latent_size(config), text_shape(config)[0]), config.run.gpus
    memory = estimate_memory(config, clip, gpus)
    rows = [*memory.lasting.items(), *memory.phases[memory.peak_phase].items()]
    lines = [
        f"  memory      of each of {gpus} GPU{'s' * (gpus > 1)}, at its peak ({memory.peak_phase}), estimated"
    ]
    lines += [f"{amount / GIGA:>14,.2f} GB  {name}" for name, amount in rows]
    lines.append(f"{memory.total / GIGA:>14,.2f} GB  in all")
    lines += [f"{'':14}{fit}" for fit in describe_fit(config, clip)]
    lines += [
        line
        for title, parts in flops_of(config, clip).items()
        for line in table_of_flops(title, parts)
    ]
    return [*lines, *describe_hours(config, clip)]


def describe_fit(config: Config, clip: Clip) -> Iterator[str]:
    """On how many of which GPU the plan fits, and that only one can be used yet."""
    for gpu in GPUS:
        fewest = fewest_gpus(config, clip, gpu)
        fits = (
            f"fits {fewest} of them"
            if fewest
            else "does not fit, nor any number up to 512: too much is on each"
        )
        yield f"{gpu.name}, {gpu.gigabytes} GB: {fits}"
    if config.run.gpus > 1 or all(fewest_gpus(config, clip, gpu) != 1 for gpu in GPUS):
        yield "NOTE: training runs on one GPU today; sharded training over several is not there yet"


def flops_of(config: Config, clip: Clip) -> dict[str, dict[str, int]]:
    pairs = config.run.stage == "pairs"
    parts = {"one pair" if pairs else "student update, one sample": student_flops(config, clip)}
    return parts | (
        {"fake-score update, one sample": fake} if (fake := fake_flops(config, clip)) else {}
    )


def table_of_flops(title: str, parts: dict[str, int]) -> Iterator[str]:
    """In TFLOP, or for the tiny world in GFLOP."""
    scale, unit = (TERA, "TFLOP") if sum(parts.values()) > TERA else (GIGA, "GFLOP")
    yield f"  operations  {title}"
    yield from (f"{amount / scale:>14,.1f} {unit}  {name}" for name, amount in parts.items())
    yield f"{sum(parts.values()) / scale:>14,.1f} {unit}  in all"


def describe_hours(config: Config, clip: Clip) -> Iterator[str]:
    if config.run.stage == "pairs" and not has_shards(config) and not config.pairs.num:
        yield "  GPU-hours   as many as captions; they are not known before the shards are there"
        return
    flops = run_flops(
        config, clip, config.pairs.num or (len(reader_of(config)) if has_shards(config) else 0)
    )
    yield f"  GPU-hours   of the whole run at {MFU:.0%} of the bf16 peak (what Self-Forcing's authors report comes to)"
    yield from (f"{hours(flops, gpu):>14} h  {gpu.name}" for gpu in GPUS)


def hours(flops: int, gpu: Gpu) -> str:
    return f"{gpu_hours(flops, gpu):,.1f}" if gpu_hours(flops, gpu) >= 0.1 else "under 0.1"


def has_shards(config: Config) -> bool:
    return (Path(config.data.shards) / INDEX_NAME).is_file()


def reader_of(config: Config) -> ShardReader:
    return ShardReader(config.data.shards)


def latent_size(config: Config) -> tuple[int, int]:
    """Height and width of the latents, of the shards where they are there."""
    if has_shards(config):
        return reader_of(config).index.latent_shape[2], reader_of(config).index.latent_shape[3]
    height, width = config.data.video_size
    return height // VAE_STRIDE, width // VAE_STRIDE


def text_shape(config: Config) -> tuple[int, int]:
    """Tokens and width of a text."""
    if has_shards(config):
        return reader_of(config).index.text_shape[0], reader_of(config).index.text_shape[1]
    return TEXT_TOKENS, config.model.text_dim
