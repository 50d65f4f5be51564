"""What a config would do, without doing it: `selfforcing-dfd train --dry-run`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from omegaconf import OmegaConf

from selfforcing_dfd.common import find_device
from selfforcing_dfd.config import Config, NetworkConfig, as_dict
from selfforcing_dfd.cost import peak_tflops
from selfforcing_dfd.processes.world import World
from selfforcing_dfd.stages import arms_of, stage_of
from selfforcing_dfd.stages.base import chunks_of
from selfforcing_dfd.tiny.text import TinyText
from selfforcing_dfd.training.build_data import open_shards
from selfforcing_dfd.training.estimate import (
    GPUS,
    UTILISATION,
    Estimate,
    Gpu,
    clip_of,
    gpu_hours,
    num_parameters,
)
from selfforcing_dfd.training.folders import run_folder
from selfforcing_dfd.training.memory import fewest_gpus, memory_of
from selfforcing_dfd.training.needs import chain_of, describe_needs, has_shards
from selfforcing_dfd.training.sequences import describe_grid, in_groups
from selfforcing_dfd.training.sizes import known_sizes
from selfforcing_dfd.training.utilisation import Utilisation

VAE_STRIDE = 8  # video pixels for each latent one, both codecs
UMT5_TOKENS = 512  # its padded length, while there are no shards to ask
UMT5_WIDTH = 4096
TERA = 1e12
GIGA = 1e9
LONG_RUN_HOURS = 24 * 30
LEAST_HOURS = 0.1  # of a GPU; shorter runs, those of the tiny world, are not told in GPU-hours
OWN_PRODUCT = (10**6, 256, 256)  # timed for a stage without transformers
TIMED_FLOPS = 10**9  # of one product, so that timing five takes no time on any machine


def plan(config: Config) -> str:
    """For every run of the config: what is trained on what, what is missing, what it costs.

    Then the sum over the recipes that it starts from, and the settings that are not the defaults.
    """
    runs = list(arms_of(config))
    lines = [f"{len(runs)} run{'s' * (len(runs) > 1)}"]
    # the runs of a comparison share their data
    prompts_do = not any(stage_of(run).needs_clips or stage_of(run).uses_clips(run) for run in runs)
    costs: list[str] = []
    for run in runs:
        cost = plan_cost(run)
        if cost == costs:
            cost = ["  cost        as of the run before"]
        else:
            costs = cost
        lines += ["", *plan_run(run, prompts_do), *cost]
    lines += describe_sum(config, runs)
    return "\n".join([*lines, "", "settings other than the defaults", settings_text(config)])


def settings_text(config: Config) -> str:
    """YAML of the settings that differ from their defaults."""
    defaults = Config(stage={name: type(section)() for name, section in config.stage.items()})
    changed = difference(as_dict(config), as_dict(defaults))
    return OmegaConf.to_yaml(OmegaConf.create(changed))


def difference(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """What of nested `values` is not in `defaults`."""
    changed: dict[str, Any] = {}
    for name, value in values.items():
        default = defaults.get(name)
        if isinstance(value, dict) and isinstance(default, dict):
            inner = difference(value, default)
            if inner:
                changed[name] = inner
        elif value != default:
            changed[name] = list(value) if isinstance(value, tuple) else value
    return changed


def plan_run(config: Config, prompts_do: bool = False) -> list[str]:
    """A run's networks, data and updates, one line each. prompts_do: data without clips will do."""
    device = find_device(config.run.device, "run.device")
    checkpointing = config.model.activation_checkpointing
    sizes = known_sizes(config)
    lines = [f"{run_folder(config)}: stage {config.run.stage} on {device}, seed {config.run.seed}"]
    if sizes:
        lines.append(f"  parameters  {describe_parameters(config)}")
    lines += [
        f"  compute     {config.model.compute}, activation checkpointing {checkpointing}",
        *describe_processes(config),
        *describe_shapes(config, sizes),
    ]
    if stage_of(config).trains_transformers:
        lines.append(f"  no caption  {describe_negative(config)}")
    lines += [f"  {name:<12}{text}" for name, text in stage_of(config).describe(config)]
    lines += describe_published(config)
    lines += describe_updates(config)
    is_wan = any(size.text_dim == UMT5_WIDTH for size in sizes.values())
    is_wan = is_wan or stage_of(config).latents(config) == "wan"
    takes_pictures = any(size.image_dim for size in sizes.values())
    lines += describe_needs(config, prompts_do and not takes_pictures, is_wan, takes_pictures)
    return lines


def describe_published(config: Config) -> Iterator[str]:
    """What is done as the public code does it, against its papers; nothing by default."""
    names = stage_of(config).as_published(config)
    if names:
        yield f"  published   as the public code: {', '.join(names)} (docs/differences.md)"


def describe_processes(config: Config) -> Iterator[str]:
    """What the processes that `run.gpus` plans for share; nothing for one."""
    gpus = config.run.gpus
    model = config.model
    if gpus > 1 or model.sequence_ranks > 1:
        in_groups(World(size=gpus), model.sequence_ranks)  # raises unless they divide
        yield f"  processes   {describe_grid(gpus, model.sequence_ranks, model.shard_ranks)}"


def describe_parameters(config: Config) -> str:
    sizes = known_sizes(config)
    counts = []
    for role in stage_of(config).starts(config):
        count = f"{num_parameters(sizes[role]):,}" if role in sizes else "unknown until it is there"
        counts.append(f"{role} {count}")
    return ", ".join(counts)


def describe_shapes(config: Config, sizes: Mapping[str, NetworkConfig]) -> Iterator[str]:
    """Latents and text of one pass; nothing while the networks' sizes are unknown."""
    if not sizes:
        return
    size = next(iter(sizes.values()))
    height, width = latent_size(config)
    rollout = config.rollout
    yield (
        f"  latents     [{config.batch.micro}, {rollout.frames}, {size.channels}, {height}, "
        f"{width}] in {len(chunks_of(config))} chunks of {rollout.chunk_frames} latent frames; "
        f"text [{text_tokens(config)}, {size.text_dim}]"
        f"{'; with a picture for each clip' if size.image_dim else ''}"
    )


def describe_updates(config: Config) -> Iterator[str]:
    batch = config.batch
    updates = stage_of(config).updates(config)
    if not updates:
        return
    counts = ", ".join(f"{count} of the {turn}" for turn, count in updates.items())
    gpus = config.run.gpus
    passes = batch.size * config.model.sequence_ranks // (batch.micro * gpus)
    each = f" of each of {gpus} GPUs" if gpus > 1 else ""
    yield f"  updates     {counts}, {batch.size} samples each in {passes} passes{each}"
    saved = config.checkpoint
    yield f"  checkpoints every {saved.every} student updates, the newest {saved.keep} kept"


def describe_negative(config: Config) -> str:
    """Which text stands for no caption."""
    if not has_shards(config):
        return "the shards' negative prompt if they hold one, else zeros"
    if open_shards(config).negative is not None:
        return "the negative prompt stored with the shards"
    return "zeros"


def estimate_of(config: Config) -> Estimate | None:
    """The costs of a run's transformers; None while the size of one of them is unknown."""
    if not stage_of(config).trains_transformers:
        return None
    sizes = known_sizes(config)
    if set(sizes) != set(stage_of(config).starts(config)):
        return None
    return Estimate(config, clip_of(config, latent_size(config), text_tokens(config)), sizes)


def plan_cost(config: Config) -> list[str]:
    """Memory of a GPU, operations of an update and hours, as a table."""
    own = stage_of(config).own_flops(config, latent_size(config))
    if own:
        return [*table_of_flops("student update, one sample", own), *describe_own_hours(config)]
    estimate = estimate_of(config)
    gpus = config.run.gpus
    if estimate is None:
        return ["  cost        unknown until the weights are there: they tell the networks' sizes"]
    memory = memory_of(estimate, gpus)
    rows = [*memory.lasting.items(), *memory.phases[memory.peak_phase].items()]
    peak = f"at its peak ({memory.peak_phase}), estimated"
    lines = [f"  memory      of each of {gpus} GPU{'s' * (gpus > 1)}, {peak}"]
    lines += [f"{amount / GIGA:>14,.2f} GB  {name}" for name, amount in rows]
    lines.append(f"{memory.total / GIGA:>14,.2f} GB  in all")
    lines += [f"{'':14}{fit}" for fit in describe_fit(estimate)]
    for turn in estimate.passes:
        lines += table_of_flops(f"{turn} update, one sample", estimate.turn_flops(turn))
    return [*lines, *describe_hours(estimate)]


def describe_fit(estimate: Estimate) -> Iterator[str]:
    """On how many of which GPU the plan fits."""
    fewest = {gpu: fewest_gpus(estimate, gpu) for gpu in GPUS}
    for gpu, count in fewest.items():
        fits = f"fits {count} of them" if count else "does not fit, nor any number up to 512"
        yield f"{gpu.name}, {gpu.gigabytes} GB: {fits}"


def table_of_flops(title: str, parts: dict[str, int]) -> Iterator[str]:
    """In TFLOP, or for the tiny world in GFLOP."""
    total = sum(parts.values())
    scale, unit = (TERA, "TFLOP") if total > TERA else (GIGA, "GFLOP")
    yield f"  operations  {title}"
    yield from (f"{amount / scale:>14,.1f} {unit}  {name}" for name, amount in parts.items())
    yield f"{total / scale:>14,.1f} {unit}  in all"


def run_flops(config: Config, again: bool = True) -> int:
    """Of the whole run; 0 where a size or the number of samples is not known yet.

    again: with what activation checkpointing makes again.
    """
    own = stage_of(config).own_flops(config, latent_size(config))
    if own:
        samples = config.run.student_updates * config.batch.size
        return samples * sum(own.values())
    estimate = estimate_of(config)
    num_items = len(open_shards(config)) if has_shards(config) else 0
    if estimate is None:
        return 0
    return estimate.run_flops(stage_of(config).num_items(config, num_items), again)


def describe_hours(estimate: Estimate) -> Iterator[str]:
    flops = run_flops(estimate.config)
    if not flops:
        yield "  hours       as many as captions; they are not known before the shards are there"
        return
    table = {gpu.name: gpu_hours(flops, gpu) for gpu in GPUS}
    if max(table.values()) >= LEAST_HOURS:
        once = UTILISATION * run_flops(estimate.config, again=False) / flops
        used = f"{UTILISATION:.0%} of the bf16 peak"
        yield f"  GPU-hours   of the whole run at {used}, as in Self-Forcing"
        yield f"{'':14}(what is computed again included; without it, MFU is {once:.0%})"
        gpus = estimate.config.run.gpus
        for name, amount in table.items():
            wall = f", {hours(amount / gpus)} h on {gpus} of them" if gpus > 1 else ""
            yield f"{hours(amount):>14} h  {name}{wall}"
    here = flops / measured_flops_per_second(estimate) / 3600
    if here < LONG_RUN_HOURS:
        yield f"  time here   {describe_time(here)}, from a short timing of matrix products"


def describe_own_hours(config: Config) -> Iterator[str]:
    """Of a stage without transformers; no utilisation of a GPU was ever measured for one."""
    flops = run_flops(config)
    if max(gpu_hours(flops, gpu) for gpu in GPUS) >= LEAST_HOURS:
        yield f"  GPU-hours   of the whole run at {UTILISATION:.0%} of the bf16 peak, a guess"
        for gpu in GPUS:
            yield f"{hours(gpu_hours(flops, gpu)):>14} h  {gpu.name}"
    here = flops / measured_rate(config, *OWN_PRODUCT) / 3600
    if here < LONG_RUN_HOURS:
        yield f"  time here   {describe_time(here)}, from a short timing of matrix products"


def utilisation_of(config: Config, device: torch.device) -> Utilisation | None:
    """For a run on this device. None where no peak is known: on a CPU, and in float32."""
    if device.type != "cuda" or config.model.compute != "bfloat16":
        return None
    return utilisation_at(config, peak_tflops(torch.cuda.get_device_name(device)))


def utilisation_at(config: Config, peak: float | None) -> Utilisation | None:
    """peak: in TFLOP/s; None for a GPU that `cost` does not know."""
    estimate = estimate_of(config)
    if estimate is None or peak is None:
        return None
    flops = {turn: sum(estimate.turn_flops(turn, again=False).values()) for turn in estimate.passes}
    return Utilisation(flops, peak * TERA)


def describe_time(hours_here: float) -> str:
    return f"{hours_here:,.1f} h" if hours_here >= 2 else f"{60 * hours_here:,.0f} min"


def hours(amount: float) -> str:
    return f"{amount:,.1f}" if amount >= LEAST_HOURS else f"under {LEAST_HOURS}"


def measured_flops_per_second(estimate: Estimate) -> float:
    """Of this machine, for products as the feed-forward makes them."""
    size: NetworkConfig = next(iter(estimate.sizes.values()))
    tokens = estimate.clip.tokens * estimate.config.batch.micro
    return measured_rate(estimate.config, tokens, size.num_heads * size.head_dim, size.ffn_dim)


def measured_rate(config: Config, rows: int, width: int, inner: int) -> float:
    """Operations a second of the product of rows x width and width x inner: the best of five."""
    device = find_device(config.run.device, "run.device")
    flops_per_row = 2 * width * inner
    rows = min(rows, max(TIMED_FLOPS // flops_per_row, 1))
    x = torch.ones(rows, width, device=device)
    weight = torch.ones(width, inner, device=device)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        float((x @ weight)[0, 0])  # waits for the device
        times.append(time.perf_counter() - start)
    return rows * flops_per_row / min(times)


def describe_sum(config: Config, runs: list[Config]) -> Iterator[str]:
    """GPU-hours of the recipes that make what is missing, and of these runs, if they are many."""
    parts = {name: run_flops(maker) for name, maker in chain_of(config).items()}
    own = sum(run_flops(run) for run in runs)
    parts[f"{config.run.name} ({len(runs)} run{'s' * (len(runs) > 1)})"] = own
    gpu: Gpu = GPUS[0]
    total = gpu_hours(sum(parts.values()), gpu)
    if len(parts) > 1 and total >= LEAST_HOURS:
        yield ""
        yield f"with the recipes that it starts from: {hours(total)} {gpu.name}-hours in all"
        for name, flops in parts.items():
            yield f"{hours(gpu_hours(flops, gpu)):>14} h  {name}"


def latent_size(config: Config) -> tuple[int, int]:
    """Height and width of the latents, of the shards where they are there."""
    if has_shards(config):
        _, _, height, width = open_shards(config).index.latent_shape
        return height, width
    height, width = config.data.video_size
    return height // VAE_STRIDE, width // VAE_STRIDE


def text_tokens(config: Config) -> int:
    """Tokens of a text."""
    if has_shards(config):
        return open_shards(config).index.text_shape[0]
    return TinyText().length if config.data.tiny.clips else UMT5_TOKENS
