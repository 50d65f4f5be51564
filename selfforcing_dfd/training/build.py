"""Config -> objects: the only place where settings and the code that uses them meet."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from selfforcing_dfd import rng
from selfforcing_dfd.common import DTYPES, find_device
from selfforcing_dfd.config import (
    Config,
    ConfigError,
    ModelConfig,
    OptimizerConfig,
    as_dict,
    change,
    find_file,
    load_config,
    require,
)
from selfforcing_dfd.context import Conditioning, KVCache
from selfforcing_dfd.data.noise import Invert
from selfforcing_dfd.flow import few_step_ladder
from selfforcing_dfd.forcing import PAIRINGS, Forcing
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.ode import invert, invert_by_chunks
from selfforcing_dfd.rollout import Chunks, plan_chunks
from selfforcing_dfd.stages.base import Stage
from selfforcing_dfd.stages.init import InitStage
from selfforcing_dfd.stages.matching import MatchingStage
from selfforcing_dfd.stages.teacher import TeacherStage
from selfforcing_dfd.training.build_data import build_order, build_reader
from selfforcing_dfd.training.checkpoint import CheckpointManager
from selfforcing_dfd.training.ema import EMA
from selfforcing_dfd.training.loop import Learner, Trainer, Watch, World
from selfforcing_dfd.training.precision import compute_in, parameters_in
from selfforcing_dfd.training.same_run import check_config
from selfforcing_dfd.training.tracking import Tracker, check_trackers
from selfforcing_dfd.weights.read import WeightsError, load_into, read_weights
from selfforcing_dfd.weights.tensors import model_fingerprint

STUDENT_FILE = "student.safetensors"


def build_network(config: ModelConfig, device: torch.device | str = "cpu") -> WanTransformer:
    """A network of the configured size with arbitrary weights."""
    network = WanTransformer(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.channels,
        out_channels=config.channels,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
    )
    if config.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    return place(network, device)


def shape_of(config: ModelConfig) -> WanTransformer:
    """A network of the configured size on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        return build_network(config, "meta")


def load_network(
    config: ModelConfig,
    weights: str,
    device: torch.device | str = "cpu",
    entry: str = "",
    dtype: torch.dtype = torch.float32,
) -> WanTransformer:
    """A network of the configured size with the weights of a file or folder in any format of
    `models/weights.py`; strict.

    entry: which model of a file that holds several. Raises ConfigError for another model's weights.
    """
    try:
        stored = read_weights(find_file(weights), entry)
    except WeightsError as error:
        raise ConfigError(f"{weights}: {error}") from error
    network = place(nn.Module.to(shape_of(config), dtype).to_empty(device=device), device)
    try:
        load_into(network, stored)
    except WeightsError as error:
        wanted = f"settings want {config.num_layers} layers of {config.num_heads} heads; make section model agree"
        raise ConfigError(f"{weights} holds another model: {wanted}. {error}") from error
    return network


def load_frozen(
    config: ModelConfig, weights: str, device: torch.device | str = "cpu", entry: str = ""
) -> WanTransformer:
    """A network that is only asked: its weights themselves are in the dtype that it computes in."""
    network = load_network(config, weights, device, entry, DTYPES[config.compute])
    if config.compute != "float32":
        network.set_attention(config.attention)
    return network.requires_grad_(False)


def train_in(config: ModelConfig, network: WanTransformer) -> WanTransformer:
    """The network, whose weights are float32, computing in the configured dtype."""
    dtype = DTYPES[config.compute]
    if dtype != torch.float32:
        # the dtype by which kernels are chosen
        with parameters_in(network, {network.patch_embedding.weight}, dtype):
            network.set_attention(config.attention)
        compute_in(network, dtype)
    return network


def place(network: WanTransformer, device: torch.device | str) -> WanTransformer:
    """The network on its device (diffusers decorates `to` with a type that checkers misread)."""
    nn.Module.to(network, device)
    return network


def sources(config: Config) -> dict[str, tuple[str, str]]:
    """What each role of the stage starts from, file or folder and entry; empty for weights from
    run.seed.
    """
    weights = config.weights
    teacher = (weights.teacher, weights.teacher_entry)
    student = (weights.student, weights.student_entry) if weights.student else teacher
    fake = (weights.fake, weights.fake_entry) if weights.fake else teacher
    if config.run.stage == "pairs":
        return {"teacher": teacher}
    return {"student": student} | (
        {"fake": fake, "teacher": teacher} if config.run.stage in ("dmd", "dfd") else {}
    )


def teacher_size(config: Config) -> ModelConfig:
    return config.teacher_model or config.model


def build_teacher(config: Config, device: torch.device | str = "cpu") -> WanTransformer:
    """The frozen teacher of the config."""
    return load_frozen(
        teacher_size(config), config.weights.teacher, device, config.weights.teacher_entry
    )


def build_networks(config: Config, device: torch.device) -> dict[str, WanTransformer]:
    """student, and for distribution matching the frozen teacher and the fake score, each with its
    starting weights.
    """
    networks: dict[str, WanTransformer] = {}
    for role, (weights, entry) in sources(config).items():
        if role == "teacher":
            networks[role] = build_teacher(config, device)
        elif weights:
            networks[role] = train_in(
                config.model, load_network(config.model, weights, device, entry)
            )
        else:
            networks[role] = build_network(config.model)
            networks[role].init_weights(rng.generator(config.run.seed, "weights"))
            train_in(config.model, place(networks[role], device))
    for network in networks.values():
        network.requires_grad_(False)
    return networks


def build_stage(
    config: Config, networks: dict[str, WanTransformer], negative: Tensor | None = None
) -> Stage:
    """negative: [L, D_text], the text of no caption; zeros by default."""
    flow, score = config.flow, config.score
    student: dict[str, nn.Module] = {"student": networks["student"]}
    past: dict[str, Any] = {
        "sink": config.rollout.sink,
        "window": config.rollout.window or None,
        "negative": negative,
    }
    if config.run.stage == "teacher":
        return TeacherStage(student, flow.shift, flow.text_dropout, negative=negative)
    chunks = build_chunks(config)
    if config.run.stage == "init":
        paired = len(chunks) if flow.paired == "all" else 1
        sigmas = build_ladder(config) if flow.levels == "ladder" else ()
        return InitStage(
            student, chunks, flow.shift, flow.text_dropout, num_paired=paired, sigmas=sigmas, **past
        )
    return MatchingStage(
        trained={**student, "fake": networks["fake"]},
        teacher=networks["teacher"],
        chunks=chunks,
        ladder=build_ladder(config),
        guidance=score.guidance,
        shift=score.shift,
        sigma_min=score.sigma_min,
        sigma_max=score.sigma_max,
        min_normaliser=score.min_normaliser,
        fake_per_student=score.fake_per_student,
        forcing=build_forcing(config),
        coin_shared_by=config.dfd.granularity,
        **past,
    )


def build_ladder(config: Config) -> tuple[float, ...]:
    return few_step_ladder(tuple(config.rollout.ladder), config.rollout.shift)


def build_chunks(config: Config) -> Chunks:
    return plan_chunks(config.rollout.frames, config.rollout.chunk_frames)


def build_forcing(config: Config) -> Forcing:
    """Plain DMD for stage dmd."""
    if config.run.stage == "dmd":
        return Forcing()
    dfd = config.dfd
    low, high = dfd.sigma_range
    return Forcing(PAIRINGS[dfd.pairing], dfd.p, dfd.p_start, dfd.ramp_updates, (low, high))


def build_learner(network: nn.Module, config: OptimizerConfig, student_updates: int) -> Learner:
    """A network with AdamW; with kind muon, Muon (torch.optim.Muon) takes the blocks' matrices and
    AdamW the rest.
    """
    parameters = dict(network.named_parameters())
    matrices = {
        n: p
        for n, p in parameters.items()
        if config.kind == "muon" and n.startswith("blocks.") and p.ndim == 2
    }
    rest = [p for n, p in parameters.items() if n not in matrices]
    decay = config.weight_decay
    optimizers: list[Optimizer] = [
        torch.optim.AdamW(rest, lr=config.lr, betas=config.betas, weight_decay=decay)
    ]
    if matrices:
        muon = torch.optim.Muon(
            matrices.values(), lr=config.lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"
        )
        optimizers.append(muon)
    for optimizer in optimizers:  # else both networks' gradients lie in memory, one of them unused
        optimizer.register_step_post_hook(
            lambda used, args, kwargs: used.zero_grad(set_to_none=True)
        )
    return Learner(network, tuple(optimizers), build_lr(config, student_updates), config.clip)


def build_lr(config: OptimizerConfig, student_updates: int) -> Callable[[int], float]:
    """Linear warm-up, then half a cosine from lr to decay * lr at the last update."""

    def lr(update: int) -> float:
        if update < config.warmup:
            return config.lr * (update + 1) / config.warmup
        progress = (update - config.warmup) / max(student_updates - config.warmup, 1)
        return config.lr * (
            config.decay + (1 - config.decay) * 0.5 * (1 + math.cos(math.pi * min(progress, 1)))
        )

    return lr


def check_start(config: Config) -> None:
    """UserError for a device, trackers or weights that are not there, before anything is made."""
    check_trackers(config.log.trackers)
    find_device(config.run.device, "run.device")
    for role, name in (
        ("student", config.weights.student),
        ("teacher", config.weights.teacher),
        ("fake", config.weights.fake),
    ):
        if name and not find_file(name).exists():
            raise ConfigError(
                f"weights.{role} is {name}, which does not exist; train it first, or correct the path"
            )


def build_invert(config: Config, num_steps: int) -> Invert:
    """The configured teacher's ODE from clips to their noise, for the packer.

    With flow.paired all, weights.teacher is a causal network, whose ODE is followed chunk by chunk.
    """
    device, rollout, shift = (
        find_device(config.run.device, "run.device"),
        config.rollout,
        config.flow.shift,
    )
    teacher = build_teacher(config, device)

    def run(latents: Tensor, text: Tensor) -> Tensor:
        latents, conditioning = latents.to(device), Conditioning(text.to(device))
        if config.flow.paired == "first":
            return invert(teacher, latents, conditioning, num_steps, shift).cpu()
        cache = KVCache(rollout.sink, rollout.window or None)
        return invert_by_chunks(
            teacher, latents, conditioning, num_steps, shift, build_chunks(config), cache
        ).cpu()

    return run


def run_folder(config: Config) -> Path:
    return Path(config.run.out) / config.run.name


def arms(config: Config) -> Iterator[Config]:
    """The runs that a config stands for: one a named arm, in runs/name/arm; without arms the config
    itself.
    """
    if not config.arms:
        yield config
    for name, overrides in config.arms.items():
        yield change(
            dataclasses.replace(config, arms={}), [f"run.name={config.run.name}/{name}", *overrides]
        )


def student_of(run: Path) -> tuple[Config, Path]:
    """Config and weights of a run's student, or of its last arm's. Raises ConfigError for a folder
    without a run.
    """
    settings = run / "config.yaml"
    known = sorted(path.parent.as_posix() for path in run.glob("*/config.yaml"))
    advice = (
        f"; name one of its arms: {', '.join(known)}"
        if known
        else "; name the folder of a finished run"
    )
    require(settings.is_file(), f"{run} has no config.yaml{advice}")
    config = load_config(str(settings))
    last = list(arms(config))[-1]
    folder = run / last.run.name.rpartition("/")[2] if config.arms else run
    return last, folder / STUDENT_FILE


MAY_CHANGE = {
    "run.student_updates",
    "run.device",
    "run.out",
    "run.gpus",
    "data.workers",
    "data.video_size",
    "checkpoint",
    "log",
    "report",
    "arms",
    "base",
}
"""Settings that a resumed run may change and still be the same run."""


def build_trainer(config: Config, watch: Watch | None = None, resume: bool = False) -> Trainer:
    """Everything that one run of `train.py` needs, continued from its newest checkpoint where asked
    and there is one.
    """
    device = find_device(config.run.device, "run.device")
    reader = build_reader(config)
    networks = build_networks(config, device)
    stage = build_stage(config, networks, reader.negative)
    folder = run_folder(config)
    fixed = {
        role: model_fingerprint(network) for role, network in networks.items() if role == "teacher"
    }
    checkpoints = CheckpointManager(
        folder / "checkpoints",
        config.checkpoint.keep,
        config=as_dict(config),
        models=fixed | {"data": reader.index_hash},
    )
    newest = checkpoints.latest() if resume else None
    if newest is not None:
        check_config(newest, as_dict(config), MAY_CHANGE)
    optim = {"student": config.optim.student, "fake": config.optim.fake}
    trainer = Trainer(
        stage=stage,
        learners={
            turn: build_learner(network, optim[turn], config.run.student_updates)
            for turn, network in stage.trained.items()
        },
        ema=EMA(networks["student"], config.ema.decay, config.ema.start),
        reader=reader,
        order=build_order(config, reader),
        batch_size=config.batch.size,
        micro=config.batch.micro,
        seed=config.run.seed,
        student_updates=config.run.student_updates,
        checkpoints=checkpoints,
        checkpoint_every=config.checkpoint.every,
        tracker=Tracker(folder, trackers=config.log.trackers, project=config.log.project),
        num_workers=config.data.workers,
        watch=watch,
        world=World(device=device),
    )
    if newest is not None:
        checkpoints.load(newest, trainer.state())
    trainer.tracker.open(trainer.clock.student_updates if resume else None)
    return trainer
