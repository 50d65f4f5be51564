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
from selfforcing_dfd.data.pack import Invert
from selfforcing_dfd.data.shards import SampleOrder, ShardReader
from selfforcing_dfd.flow import few_step_ladder
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.network import Conditioning
from selfforcing_dfd.rollout import Chunk, plan_chunks
from selfforcing_dfd.sampling import invert
from selfforcing_dfd.training.checkpoint import CheckpointManager, check_config
from selfforcing_dfd.training.ema import EMA, load_weights, model_fingerprint
from selfforcing_dfd.training.loop import Learner, Trainer, Watch, World
from selfforcing_dfd.training.stages import DataForcing, InitStage, MatchingStage, Stage, TeacherStage
from selfforcing_dfd.training.tracking import Tracker

BASIS = "assets/tiny/codec.safetensors"
STUDENT_FILE = "student.safetensors"


def build_device(name: str) -> torch.device:
    """`auto` takes a GPU where there is one. Raises ConfigError for a GPU that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"run.device is {name!r}; use auto, cpu, cuda or cuda:N") from error
    found = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= found:
        raise ConfigError(f"run.device is {name} but torch sees {found} GPUs; use run.device=auto or run.device=cpu")
    return device


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


def load_network(config: ModelConfig, weights: str, device: torch.device | str = "cpu") -> WanTransformer:
    """A network with the weights of a safetensors file; strict. Raises CheckpointError for another model's weights."""
    tensors, _ = load_weights(find_file(weights))
    network = build_network(config)
    own = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    differing = [n for n in {**own, **tensors} if n not in own or n not in tensors or own[n] != tuple(tensors[n].shape)]
    if differing:
        first = differing[0]
        got = tuple(tensors[first].shape) if first in tensors else "nothing"
        raise ConfigError(
            f"{weights} holds another model: {len(differing)} of {len(own)} tensors differ, first {first}: got {got}, "
            f"want {own.get(first, 'nothing')}; make section model agree with the weights"
        )
    network.load_state_dict(tensors)
    return place(network, device)


def place(network: WanTransformer, device: torch.device | str) -> WanTransformer:
    """The network on its device (diffusers decorates `to` with a type that checkers misread)."""
    nn.Module.to(network, device)
    return network


def build_networks(config: Config, device: torch.device) -> dict[str, WanTransformer]:
    """student, and for distribution matching the frozen teacher and the fake score, each with its starting weights."""
    weights = config.weights
    networks: dict[str, WanTransformer] = {}
    if config.run.stage in ("dmd", "dfd"):
        networks["teacher"] = load_network(config.model, weights.teacher, device)
        networks["fake"] = load_network(config.model, weights.fake or weights.teacher, device)
    start = weights.student or weights.teacher
    if start:
        networks["student"] = load_network(config.model, start, device)
    else:
        networks["student"] = build_network(config.model)
        networks["student"].init_weights(rng.generator(config.run.seed, "weights"))
        place(networks["student"], device)
    for network in networks.values():
        network.requires_grad_(False)
    return networks


def build_stage(config: Config, networks: dict[str, WanTransformer]) -> Stage:
    chunks = plan_chunks(config.rollout.frames, config.rollout.chunk_frames)
    past: dict[str, Any] = {"sink": config.rollout.sink, "window": config.rollout.window or None}
    if config.run.stage == "teacher":
        return TeacherStage({"student": networks["student"]}, config.flow.shift, config.flow.text_dropout)
    if config.run.stage == "init":
        flow = config.flow
        return InitStage({"student": networks["student"]}, chunks, flow.shift, flow.text_dropout, **past)
    score = config.score
    return MatchingStage(
        trained={"student": networks["student"], "fake": networks["fake"]},
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
        **past,
    )


def build_ladder(config: Config) -> tuple[float, ...]:
    return few_step_ladder(tuple(config.rollout.ladder), config.rollout.shift)


def build_chunks(config: Config) -> tuple[Chunk, ...]:
    return plan_chunks(config.rollout.frames, config.rollout.chunk_frames)


def build_forcing(config: Config) -> DataForcing:
    """Plain DMD for stage dmd."""
    if config.run.stage == "dmd":
        return DataForcing()
    dfd, (low, high) = config.dfd, config.dfd.sigma_range
    return DataForcing(dfd.p, dfd.p_start, dfd.ramp_updates, dfd.granularity, dfd.pairing, (low, high))


def build_learner(network: nn.Module, config: OptimizerConfig, student_updates: int) -> Learner:
    """A network with AdamW; with kind muon, Muon (torch.optim.Muon) takes the blocks' matrices and AdamW the rest."""
    parameters = dict(network.named_parameters())
    matrices = {
        n: p for n, p in parameters.items() if config.kind == "muon" and n.startswith("blocks.") and p.ndim == 2
    }
    rest = [p for n, p in parameters.items() if n not in matrices]
    decay = config.weight_decay
    optimizers: list[Optimizer] = [torch.optim.AdamW(rest, lr=config.lr, betas=config.betas, weight_decay=decay)]
    if matrices:
        muon = torch.optim.Muon(matrices.values(), lr=config.lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        optimizers.append(muon)
    return Learner(network, tuple(optimizers), build_lr(config, student_updates), config.clip)


def build_lr(config: OptimizerConfig, student_updates: int) -> Callable[[int], float]:
    """Linear warm-up, then half a cosine from lr to decay * lr at the last update."""

    def lr(update: int) -> float:
        if update < config.warmup:
            return config.lr * (update + 1) / config.warmup
        progress = (update - config.warmup) / max(student_updates - config.warmup, 1)
        return config.lr * (config.decay + (1 - config.decay) * 0.5 * (1 + math.cos(math.pi * min(progress, 1))))

    return lr


def check_start(config: Config) -> None:
    """ConfigError for a device or weights that are not there: found out before data is made or anything is trained."""
    build_device(config.run.device)
    for role, name in (
        ("student", config.weights.student),
        ("teacher", config.weights.teacher),
        ("fake", config.weights.fake),
    ):
        if name and not find_file(name).is_file():
            raise ConfigError(f"weights.{role} is {name}, which does not exist; train it first, or correct the path")


def build_invert(config: Config, num_steps: int) -> Invert:
    """The configured teacher's ODE from clips to their noise, for the packer."""
    device = build_device(config.run.device)
    teacher = load_network(config.model, config.weights.teacher, device)

    def run(latents: Tensor, text: Tensor) -> Tensor:
        conditioning = Conditioning(text.to(device))
        return invert(teacher, latents.to(device), conditioning, num_steps, config.flow.shift).cpu()

    return run


def build_reader(config: Config) -> ShardReader:
    """The data set; refuses latents, text or missing noise that do not fit the configured model, clip length and pairing."""
    reader = ShardReader(Path(config.data.shards))
    if config.run.stage == "dfd" and config.dfd.pairing in ("inversion", "prefix") and not reader.has_noise:
        raise ConfigError(
            f"dfd.pairing is {config.dfd.pairing}, but {config.data.shards} holds no noise: add it with "
            f"`python -m selfforcing_dfd invert {config.data.shards} --config CONFIG`, or pair by caption"
        )
    wanted = (config.rollout.frames, config.model.channels)
    if tuple(reader.index.latent_shape[:2]) != wanted:
        raise ConfigError(
            f"{config.data.shards} holds latents {tuple(reader.index.latent_shape)} [F, C, H, W], but rollout.frames is "
            f"{wanted[0]} and model.channels is {wanted[1]}; change these or pack the clips again"
        )
    if reader.index.text_shape[1] != config.model.text_dim:
        raise ConfigError(
            f"{config.data.shards} holds text of width {reader.index.text_shape[1]}, but model.text_dim is "
            f"{config.model.text_dim}; use model.text_dim={reader.index.text_shape[1]} or pack with another text encoder"
        )
    return reader


def codec_file(config: Config) -> Path:
    """The basis beside the shards if the packer refitted it, else the shipped one."""
    beside = Path(config.data.shards) / "codec.safetensors"
    return beside if beside.exists() else find_file(BASIS)


def build_order(config: Config, reader: ShardReader) -> SampleOrder:
    return SampleOrder(len(reader), config.run.seed, reader.caption_ids, config.batch.group)


def run_folder(config: Config) -> Path:
    return Path(config.run.out) / config.run.name


def arms(config: Config) -> Iterator[Config]:
    """The runs that a config stands for: one a named arm, in runs/name/arm; without arms the config itself."""
    if not config.arms:
        yield config
    for name, overrides in config.arms.items():
        yield change(dataclasses.replace(config, arms={}), [f"run.name={config.run.name}/{name}", *overrides])


def student_of(run: Path) -> tuple[Config, Path]:
    """Config and weights of a run's student, or of its last arm's. Raises ConfigError for a folder without a run."""
    settings = run / "config.yaml"
    known = sorted(path.parent.as_posix() for path in run.glob("*/config.yaml"))
    advice = f"; name one of its arms: {', '.join(known)}" if known else "; name the folder of a finished run"
    require(settings.is_file(), f"{run} has no config.yaml{advice}")
    config = load_config(str(settings))
    last = list(arms(config))[-1]
    folder = run / last.run.name.rpartition("/")[2] if config.arms else run
    return last, folder / STUDENT_FILE


MAY_CHANGE = {
    "run.student_updates",
    "run.device",
    "run.out",
    "data.workers",
    "checkpoint",
    "log",
    "report",
    "arms",
    "base",
}
"""Settings that a resumed run may change and still be the same run."""


def build_trainer(config: Config, watch: Watch | None = None, resume: bool = False) -> Trainer:
    """Everything that one run of `train.py` needs, continued from its newest checkpoint where asked and there is one."""
    device = build_device(config.run.device)
    reader = build_reader(config)
    networks = build_networks(config, device)
    stage = build_stage(config, networks)
    folder = run_folder(config)
    fixed = {role: model_fingerprint(network) for role, network in networks.items() if role == "teacher"}
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
        tracker=Tracker(folder, tensorboard=config.log.tensorboard, wandb_project=config.log.wandb_project),
        num_workers=config.data.workers,
        watch=watch,
        world=World(device=device),
    )
    if newest is not None:
        checkpoints.load(newest, trainer.state())
    trainer.tracker.open(trainer.clock.student_updates if resume else None)
    return trainer
