"""What a run starts from, and for what is not there the command that fetches or makes it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

from omegaconf import OmegaConf

from selfforcing_dfd.common import find_file
from selfforcing_dfd.config import Config
from selfforcing_dfd.data.places import is_there
from selfforcing_dfd.stages import arms_of, load_config, stage_of
from selfforcing_dfd.stages.base import Start
from selfforcing_dfd.stages.config_files import training_configs
from selfforcing_dfd.training.build_data import open_shards

ENCODERS = "weights/Wan2.1-T2V-1.3B-Diffusers"  # VAE and text encoder; those of 14B are the same
PICTURE_ENCODER = "weights/Wan2.1-I2V-14B-480P-Diffusers"
DFD_DATA = "csusupergear/vipe_long_lmdb"
DFD_FOLDER = "data/vipe_long_lmdb"
# of Self-Forcing: prompts are all that DMD needs
PROMPTS = "vidprom_filtered_extended.txt"
PROMPT_FOLDER = "data"
COMMAND = "selfforcing-dfd"

REPOSITORIES = {
    "Wan2.1-T2V-1.3B-Diffusers": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "Wan2.1-T2V-14B-Diffusers": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    "Wan2.1-I2V-14B-480P-Diffusers": "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
    "Wan2.1-T2V-1.3B": "Wan-AI/Wan2.1-T2V-1.3B",
    "Wan2.1-T2V-14B": "Wan-AI/Wan2.1-T2V-14B",
    "Wan2.1-I2V-14B-480P": "Wan-AI/Wan2.1-I2V-14B-480P",
    "Self-Forcing": "gdhe17/Self-Forcing",
}
"""Hub repositories by the name of the folder that a config expects them in."""

FILES = {
    "checkpoints/self_forcing_dmd.pt": "gdhe17/Self-Forcing",
    "checkpoints/ode_init.pt": "gdhe17/Self-Forcing",
}
"""Hub repositories by the end of a file's path, whatever folder it was downloaded to."""


def describe_needs(
    config: Config, prompts_do: bool, is_wan: bool, takes_pictures: bool
) -> Iterator[str]:
    """Weights, clips, noise and pictures that a run starts from, a line each; (MISSING) with cure.

    prompts_do: captions without clips will do. is_wan: the networks are of Wan's text width.
    takes_pictures: they are of Wan2.1-I2V.
    """
    yield from describe_starts(config)
    folder = config.data.shards
    tiny = config.data.tiny
    if has_shards(config):
        yield f"  {'data':<12}{folder}, {len(open_shards(config))} samples"
    elif tiny.clips:
        made = f"{tiny.clips} tiny-world clips with {tiny.level} captions"
        yield f"  {'data':<12}{folder}, to be made from {made}"
    else:
        yield f"  {'data':<12}{folder} (MISSING)"
        yield from (
            f"{'':14}{command}" for command in how_to_make_shards(config, prompts_do, is_wan)
        )
    has_noise = has_shards(config) and open_shards(config).has_noise
    if stage_of(config).needs_noise(config) and not tiny.noise_steps and not has_noise:
        yield f"  {'noise':<12}not in {folder} (MISSING)"
        yield f"{'':14}{COMMAND} invert {folder} --config CONFIG   # this one"
    has_pictures = has_shards(config) and open_shards(config).has_pictures
    if takes_pictures and not has_pictures:
        yield f"  {'pictures':<12}not in {folder} (MISSING)"
        yield f"{'':14}{how_to_get(PICTURE_ENCODER)}"
        yield f"{'':14}{COMMAND} images {folder} --model {PICTURE_ENCODER}"


def describe_starts(config: Config) -> Iterator[str]:
    roles_of: dict[Start, list[str]] = {}
    for role, start in stage_of(config).starts(config).items():
        if start.path:
            roles_of.setdefault(replace(start, adapter=""), []).append(role)
        if start.adapter:
            roles_of[Start(start.adapter)] = [f"adapter of the {role}"]
    for start, roles in roles_of.items():
        entry = f" [{start.entry}]" if start.entry else ""
        text = f"  {'start':<12}{' and '.join(roles)}: {start.path}{entry}"
        if find_file(start.path).exists():
            yield text
        else:
            yield f"{text} (MISSING)"
            yield f"{'':14}{how_to_get(start.path)}"
    for setting, path in stage_of(config).reads(config).items():
        text = f"  {'reads':<12}{setting}: {path}"
        there = find_file(path).exists()
        yield text if there else f"{text} (MISSING)"
        if not there:
            yield f"{'':14}{how_to_get(path)}"
    if not roles_of:
        yield f"  {'start':<12}nothing: fresh weights from run.seed"


def is_published(path: str) -> bool:
    """Whether a path names weights that can be downloaded."""
    in_folder = REPOSITORIES.keys() & set(Path(path).parts)
    return bool(in_folder) or any(path.endswith(f"/{ending}") for ending in FILES)


def how_to_get(path: str) -> str:
    """The command that fetches published weights, or trains what a shipped config exports."""
    for ending, repository in FILES.items():
        if path.endswith(f"/{ending}") and not REPOSITORIES.keys() & set(Path(path).parts):
            folder = path.removesuffix(f"/{ending}")
            return f"hf download {repository} {ending} --local-dir {shlex.quote(folder)}"
    parts = Path(path).parts
    for depth, part in enumerate(parts):
        if part in REPOSITORIES:
            folder = shlex.quote(str(Path(*parts[: depth + 1])))
            inside = "/".join(parts[depth + 1 :])
            wanted = f" {shlex.quote(inside)}" if inside else ""
            return f"hf download {REPOSITORIES[part]}{wanted} --local-dir {folder}"
    maker = maker_of_run(str(Path(path).parent))
    if maker:
        return f"{COMMAND} train --config {maker}"
    return "no shipped config makes it; correct the path"


def how_to_make_shards(config: Config, prompts_do: bool, is_wan: bool) -> Iterator[str]:
    """The commands that write data.shards: a shipped config of pairs, the packer, the importer."""
    maker = maker_of_shards(config.data.shards)
    if maker:
        yield f"{COMMAND} train --config {maker}"
        return
    height, width = config.data.video_size
    models = f" --model {ENCODERS}" if is_wan else ""
    frames = f"--frames {1 + 4 * (config.rollout.frames - 1)} --size {height}x{width}"
    out = f"--out {config.data.shards}"
    if is_wan and prompts_do:
        yield f"hf download {REPOSITORIES['Self-Forcing']} {PROMPTS} --local-dir {PROMPT_FOLDER}"
        yield f"{COMMAND} prompts {PROMPT_FOLDER}/{PROMPTS}{models} {frames} {out}"
        yield f"or, from clips: {COMMAND} pack CLIPS --codec wan{models} {frames} {out}"
        return
    yield f"{COMMAND} pack CLIPS --codec {'wan' if is_wan else 'tiny'}{models} {frames} {out}"
    if is_wan:
        yield f"or, DFD's own: hf download {DFD_DATA} --repo-type dataset --local-dir {DFD_FOLDER}"
        yield f"               {COMMAND} import {DFD_FOLDER}{models} {out}"


@cache
def shipped_configs() -> dict[str, dict[str, dict[str, str]]]:
    """Own settings of every shipped training config, by its name. Cached, do not modify."""
    found = {}
    for name, path in training_configs().items():
        own = OmegaConf.to_container(OmegaConf.load(path))
        if isinstance(own, dict):
            found[name] = own
    return found  # type: ignore[return-value]


@cache
def shipped_config(name: str) -> Config:
    """A shipped config, loaded once."""
    return load_config(name)


def maker_of_run(folder: str) -> str:
    """The shipped config whose run writes this folder; empty for none."""
    for name, own in shipped_configs().items():
        run = own.get("run") or {}
        if f"{run.get('out', 'runs')}/{run.get('name', '')}" == folder:
            return name
    return ""


def maker_of_shards(folder: str) -> str:
    """The shipped config of stage pairs that writes this folder; empty for none."""
    for name, own in shipped_configs().items():
        if (own.get("pairs") or {}).get("out", "") == folder:
            return name
    return ""


def chain_of(config: Config) -> dict[str, Config]:
    """Names of the shipped recipes that make the missing weights of all its runs, in order."""
    chain: dict[str, Config] = {}
    names = [maker_of_shards(config.data.shards)] if not has_shards(config) else []
    starts = [start for run in arms_of(config) for start in stage_of(run).starts(run).values()]
    for path in (path for start in starts for path in (start.path, start.adapter)):
        if path and not find_file(path).exists():
            names.append(maker_of_run(str(Path(path).parent)))
    for name in filter(None, names):
        maker = shipped_config(name)
        if maker.run.name != config.run.name:
            chain = {**chain, **chain_of(maker), name: maker}
    return chain


def has_shards(config: Config) -> bool:
    return is_there(config.data.shards)
