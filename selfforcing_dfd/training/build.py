"""Config -> objects: the only place where settings and the code that uses them meet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import torch
from torch import nn

from selfforcing_dfd import rng
from selfforcing_dfd.common import DTYPES, find_file
from selfforcing_dfd.config import Config, ConfigError, ModelConfig, NetworkConfig, as_dict, require
from selfforcing_dfd.models.adapted import AdaptedNetwork, StageNetwork, adapt, base_of
from selfforcing_dfd.models.picture import picture_arguments
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.processes.ranks import on_first_rank
from selfforcing_dfd.processes.world import World, find_world
from selfforcing_dfd.stages import stage_of
from selfforcing_dfd.stages.base import Start, TrainingStage, teacher_start
from selfforcing_dfd.training.agreement import norms_of, require_agreement
from selfforcing_dfd.training.build_data import build_order, build_reader, check_shapes
from selfforcing_dfd.training.checkpoint import CheckpointManager
from selfforcing_dfd.training.ema import EMA
from selfforcing_dfd.training.exports import describe_networks
from selfforcing_dfd.training.folders import CHECKPOINTS, run_folder
from selfforcing_dfd.training.late_weights import fill, is_without_memory, without_memory
from selfforcing_dfd.training.loop import Learner, Trainer
from selfforcing_dfd.training.metrics import Watch
from selfforcing_dfd.training.optimizers import build_learner
from selfforcing_dfd.training.recompute import recompute
from selfforcing_dfd.training.same_run import MAY_CHANGE, check_config, config_fingerprint
from selfforcing_dfd.training.saving import Saver
from selfforcing_dfd.training.sequences import in_groups, share_sequences
from selfforcing_dfd.training.sharding import Sharding
from selfforcing_dfd.training.tracking import Tracker
from selfforcing_dfd.weights.adapters import read_adapter
from selfforcing_dfd.weights.read import load_network
from selfforcing_dfd.weights.tensors import model_fingerprint


def build_network(size: NetworkConfig, device: torch.device | str = "cpu") -> WanTransformer:
    """A network of this size with arbitrary weights."""
    network = WanTransformer(
        num_attention_heads=size.num_heads,
        attention_head_dim=size.head_dim,
        out_channels=size.channels,
        text_dim=size.text_dim,
        freq_dim=size.freq_dim,
        ffn_dim=size.ffn_dim,
        num_layers=size.num_layers,
        **picture_arguments(size.channels, size.image_dim or None, size.num_heads * size.head_dim),
    )
    return place(network, device)


@cache
def shape_of(size: NetworkConfig) -> WanTransformer:
    """A network of this size on the meta device: names and shapes, no memory. Do not modify it."""
    with torch.device("meta"):
        return build_network(size, "meta")


def load_start(
    start: Start, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> WanTransformer:
    """The network of some weights; its size comes with them. Raises WeightsError."""
    return load_network(find_file(start.path), start.entry, device, dtype, start.head_dim)


def load_frozen(config: Config, start: Start, device: torch.device | str = "cpu") -> WanTransformer:
    """A network that is only asked: its weights are in the dtype that it computes in."""
    network = load_start(start, device, DTYPES[config.model.compute])
    return ask_in(config.model, network).requires_grad_(False)


def ask_in(config: ModelConfig, network: WanTransformer) -> WanTransformer:
    """The network, whose weights are in the configured dtype, ready to compute.

    A gradient may go through it to what it is asked about, as that of a GAN does.
    """
    recompute(network, config.activation_checkpointing)
    if config.compute != "float32":
        network.set_attention(config.attention)
    if config.compile:
        network.compile_blocks()
    return network


def train_in(config: ModelConfig, network: WanTransformer) -> WanTransformer:
    """The network, whose weights are float32, ready to compute in the configured dtype.

    `Sharding` casts its weights.
    """
    recompute(network, config.activation_checkpointing)
    if config.compute != "float32":
        network.set_attention(config.attention, DTYPES[config.compute])
    if config.compile:
        network.compile_blocks()
    return network


def place(network: WanTransformer, device: torch.device | str) -> WanTransformer:
    """The network on its device (diffusers decorates `to` with a type that checkers misread)."""
    nn.Module.to(network, device)
    return network


def build_teacher(config: Config, device: torch.device | str = "cpu") -> WanTransformer:
    """The frozen teacher of the config."""
    return load_frozen(config, teacher_start(config), device)


FROZEN = ("teacher", "causal")
"""Roles that are asked and never trained."""


def build_networks(
    config: Config, device: torch.device, late: bool = False
) -> dict[str, StageNetwork]:
    """Each network of the stage with its starting weights; the teacher is frozen.

    late: weights are read when the networks are sharded, see `late_weights`; not below adapters.
    Raises WeightsError for weights that cannot be read, ConfigError for networks that do not fit
    each other.
    """
    if config.model.lora_rank:
        networks = build_adapted(config, device)
    else:
        networks = build_whole(config, device, late)
    for network in networks.values():
        network.requires_grad_(False)
    check_networks(networks)
    return networks


def build_adapted(config: Config, device: torch.device) -> dict[str, StageNetwork]:
    """Each network of the stage as an adapter over frozen weights; the teacher has none.

    Roles that start from the same weights share them: one copy serves all.
    """
    rank = config.model.lora_rank
    bases: dict[Start, WanTransformer] = {}
    networks: dict[str, StageNetwork] = {}
    for role, start in stage_of(config).starts(config).items():
        require(
            bool(start.path),
            f"model.lora_rank is {rank}, but the {role} starts from nothing, and an adapter needs "
            f"weights below it: name weights.{role}, or train all weights with model.lora_rank=0",
        )
        weights = replace(start, adapter="")
        if weights not in bases:
            bases[weights] = load_frozen(config, weights, device)
        base = bases[weights]
        networks[role] = AdaptedNetwork(base)
        if role not in FROZEN:
            tensors = read_adapter(find_file(start.adapter)) if start.adapter else None
            networks[role] = adapt(base, role, rank, config.run.seed, tensors)
    return networks


def build_whole(config: Config, device: torch.device, late: bool) -> dict[str, StageNetwork]:
    """Each network of the stage with weights of its own. late: see `build_networks`."""
    networks: dict[str, StageNetwork] = {}
    for role, start in stage_of(config).starts(config).items():
        if late and start.path:
            dtype = config.model.compute if role in FROZEN else "float32"
            networks[role] = without_memory(start, DTYPES[dtype])
        elif role in FROZEN:
            networks[role] = load_frozen(config, start, device)
        elif start.path:
            networks[role] = train_in(config.model, load_start(start, device))
        else:
            network = build_network(config.network)
            network.init_weights(rng.generator(config.run.seed, "weights"))
            networks[role] = train_in(config.model, place(network, device))
    return networks


def check_networks(networks: Mapping[str, StageNetwork]) -> None:
    """ConfigError unless all networks of a stage see the same latents and text."""
    shapes = {
        role: (network.config["in_channels"], network.config["text_dim"])
        for role, network in networks.items()
    }
    if len(set(shapes.values())) > 1:
        shown = "; ".join(f"{role} {shape}" for role, shape in shapes.items())
        raise ConfigError(
            f"the networks see different data, (channels, text width): {shown}; name weights of "
            "models that share a VAE and a text encoder"
        )


def training_stage_of(config: Config) -> type[TrainingStage]:
    """The config's stage, which must be one that trains."""
    stage = stage_of(config)
    if not issubclass(stage, TrainingStage):
        raise ConfigError(f"run.stage is {stage.name}, which trains no network")
    return stage


def build_trainer(
    config: Config,
    watch: Watch | None = None,
    resume: bool = False,
    aside: Mapping[str, int] | None = None,
) -> Trainer:
    """The trainer of one run, resumed from its newest checkpoint if asked and if there is one.

    aside: samples to leave out, by key, with the position in the data from which on.
    """
    world = in_groups(find_world(config.run.device), config.model.sequence_ranks)
    check_batch(config, world)
    reader = build_reader(config)
    networks = build_networks(config, world.device, late=world.size > 1)
    training_stage = training_stage_of(config)
    training_stage.check_shards(config, reader)
    if training_stage.trains_transformers:
        check_shapes(config, reader, networks["student"].config)
    folder = run_folder(config)
    fixed = fixed_fingerprints(networks)
    further = build_further(config, world, networks)
    modules = {**networks, **further}
    settings = as_dict(config) | {"networks": describe_networks(config, reader, networks)}
    models = fixed | {"data": reader.index_hash}
    _, _, rows, columns = reader.index.latent_shape
    bases = {role: base_of(network) for role, network in networks.items()}
    share_sequences(world, bases, (rows, columns), config.run.timeout_s)
    facts = {**models, "settings": config_fingerprint(settings)}
    models |= spread(config, world, modules, facts)
    stage = training_stage.build(config, modules, reader.negative)
    checkpoints = CheckpointManager(
        folder / CHECKPOINTS, config.checkpoint.keep, config=settings, models=models
    )
    newest = on_first_rank(checkpoints.latest) if resume else None
    if newest is not None:
        check_config(newest, settings, MAY_CHANGE)
    trainer = Trainer(
        stage=stage,
        learners=build_learners(config, stage),
        ema=EMA(modules["student"], config.ema.decay, config.ema.start),
        reader=reader,
        order=build_order(config, reader, aside or {}),
        batch_size=config.batch.size,
        micro=config.batch.micro,
        seed=config.run.seed,
        student_updates=config.run.student_updates,
        saver=Saver(checkpoints, saves_in_background(config, world)),
        checkpoint_every=config.checkpoint.every,
        tracker=Tracker(folder, trackers=config.log.trackers, project=config.log.project),
        num_workers=config.data.workers,
        watch=watch,
        world=world,
    )
    if newest is not None:
        checkpoints.load(newest, trainer.state())
    on_first_rank(lambda: trainer.tracker.open(trainer.clock if resume else None))
    return trainer


def saves_in_background(config: Config, world: World) -> bool:
    """Whether training goes on during a save. On a CPU it would take the cores from training."""
    chosen = config.checkpoint.background
    return world.device.type == "cuda" if chosen == "auto" else chosen == "always"


def build_learners(config: Config, stage: TrainingStage) -> dict[str, Learner]:
    """What the stage trains, with optimizers; the discriminator learns as the fake score does."""
    optim = {
        "student": config.optim.student,
        "fake": config.optim.fake,
        "regression": config.optim.regression,
        "discriminator": config.optim.fake,
    }
    return {
        turn: build_learner(network, optim[turn], config.run.student_updates)
        for turn, network in stage.trained.items()
    }


def build_further(
    config: Config, world: World, networks: Mapping[str, StageNetwork]
) -> dict[str, nn.Module]:
    """Networks that the stage makes itself. ConfigError where they cannot share sequences."""
    generator = rng.generator(config.run.seed, "further weights")
    further = training_stage_of(config).further_networks(config, networks, generator)
    for name, module in further.items():
        module.to(world.device, DTYPES["float32"])
        require(
            world.sequence_ranks == 1,
            f"model.sequence_ranks is {world.sequence_ranks}, but the {name} sees whole sequences; "
            "use model.sequence_ranks=1",
        )
    return further


def fixed_fingerprints(networks: Mapping[str, StageNetwork]) -> dict[str, str]:
    """Of weights that are not trained, by whose they are; below an adapter they are named so.

    Those that are read later are left to `spread`.
    """
    fingerprint = cache(model_fingerprint)
    without = cache(AdaptedNetwork)  # one for each set of weights
    marks = {}
    for role, network in networks.items():
        if is_without_memory(network):
            continue
        if isinstance(network, AdaptedNetwork):
            name = role if role in FROZEN else f"weights below the {role}"
            marks[name] = fingerprint(without(network.base))
        elif role in FROZEN:
            marks[role] = fingerprint(network)
    return marks


def spread(
    config: Config, world: World, networks: Mapping[str, nn.Module], facts: Mapping[str, str]
) -> dict[str, str]:
    """Shard the networks over all processes, and read the weights that are not there yet.

    facts: what the run is of, by name. Returns the fingerprints of frozen weights that it read.
    Raises DisagreementError for processes with other facts or weights, before parts are mixed.
    """
    late = [role for role, network in networks.items() if is_without_memory(network)]
    if world.size > 1:
        there = {role: network for role, network in networks.items() if role not in late}
        require_agreement({**facts, **norms_of(there)})
    sharding = Sharding(world, config.model.shard_ranks, DTYPES[config.model.compute])
    trained = {base_of(network) for role, network in networks.items() if role not in FROZEN}
    for network in dict.fromkeys(map(base_of, networks.values())):
        sharding.apply(network, is_trained=network in trained)
    starts = stage_of(config).starts(config)
    seen = {role: fill(networks[role], starts[role], world.device) for role in late}
    require_agreement({f"norm of the {role}'s weights": each.norm for role, each in seen.items()})
    for role in late:
        ready(config.model, networks[role], role)
    return {role: each.fingerprint for role, each in seen.items() if role in FROZEN}


def ready(config: ModelConfig, network: nn.Module, role: str) -> None:
    """A sharded network with its weights, ready to compute."""
    assert isinstance(network, WanTransformer)
    if role in FROZEN:
        ask_in(config, network)
    else:
        train_in(config, network)


def check_batch(config: Config, world: World) -> None:
    """ConfigError unless every process gets as many whole micro-batches of an update."""
    size = config.batch.size
    at_once = config.batch.micro * world.data_size
    takers = f"{world.size} processes"
    if world.sequence_ranks > 1:
        takers = f"{world.data_size} groups of {world.sequence_ranks} processes"
    require(
        size % at_once == 0,
        f"batch.size is {size}, but {takers} with {config.batch.micro} samples each "
        f"take {at_once} at a time; use batch.size={size + -size % at_once}, or a batch.micro or "
        "a number of processes that divides it",
    )
