"""Student and fake score as adapters over one set of weights: the way to train 14B."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo import in_processes
from processes import Trained, assert_equal, error, train_in_float64
from safetensors.torch import load_file, save_file
from tiny_models import FRAMES, conditioning, fill_weights, latents, tiny_network
from torch import Tensor

from selfforcing_dfd.cli.train import run
from selfforcing_dfd.common import UserError
from selfforcing_dfd.config import Config, ConfigError
from selfforcing_dfd.models.adapted import AdaptedNetwork, adapt
from selfforcing_dfd.training.build import build_networks, build_trainer
from selfforcing_dfd.training.exports import export
from selfforcing_dfd.training.folders import run_folder
from selfforcing_dfd.training.loop import Trainer, gradients
from selfforcing_dfd.training.recompute import recompute
from selfforcing_dfd.training.starts import check_start
from selfforcing_dfd.weights.adapters import merged
from selfforcing_dfd.weights.read import load_network
from selfforcing_dfd.weights.stored import WeightsError
from tests.training.conftest import config_in

RANK = 2
CPU = torch.device("cpu")


@pytest.fixture
def lora(settings: Callable[..., Config]) -> Callable[..., Config]:
    """A DMD run of adapters, two samples an update."""
    given = ["run.stage=dmd", "batch.size=2", "batch.micro=1", "score.fake_per_student=1"]
    given += ["run.student_updates=2", f"model.lora_rank={RANK}"]
    given += ["optim.student.lr=1e-2", "optim.fake.lr=1e-2"]
    return partial(settings, *given)


def answers(networks: dict[str, Any]) -> dict[str, Tensor]:
    """Each network's flow for one input."""
    size = networks["teacher"].config
    shape = (1, 9, size["in_channels"], 8, 8)
    x_t = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    text = torch.randn(1, 5, size["text_dim"], generator=torch.Generator().manual_seed(1))
    given = conditioning(1, torch.float32)
    given = type(given)(text)
    with torch.no_grad():
        return {role: network(x_t, 0.5, given).flow for role, network in networks.items()}


def test_roles_begin_as_one_and_the_teacher_stays(lora: Callable[..., Config]) -> None:
    """Catches an adapter that changes something at the start, works for another role, or leaks.

    Also three copies of the weights where one would do.
    """
    networks = build_networks(lora(), CPU)
    assert len({network.base for network in networks.values()}) == 1  # type: ignore[union-attr]
    first = answers(networks)
    assert torch.equal(first["student"], first["teacher"])
    assert torch.equal(first["fake"], first["teacher"])
    fill_weights(networks["student"], 3)
    second = answers(networks)
    assert torch.equal(second["fake"], first["teacher"])
    assert torch.equal(second["teacher"], first["teacher"])
    assert error(second["student"], first["teacher"]) > 0.01


def test_blocks_that_run_again_use_the_adapter_of_their_call() -> None:
    """Catches a backward pass through the adapter of whoever was asked last.

    Between the student's call and its backward pass, fake score and teacher are asked.
    """
    grads = []
    for what in ("none", "full", "selective"):
        base = tiny_network(0).requires_grad_(False)
        recompute(base, what)  # type: ignore[arg-type]
        roles = {name: adapt(base, name, RANK, seed=0) for name in ("student", "fake")}
        for seed, network in enumerate(roles.values()):
            network.to(torch.float64)
            fill_weights(network, seed)
        x_t = latents("x", FRAMES)
        flow = roles["student"](x_t, 0.5, conditioning()).flow
        with torch.no_grad():
            target = roles["fake"](x_t, 0.5, conditioning()).flow
            target = target + AdaptedNetwork(base)(x_t, 0.5, conditioning()).flow
        (flow - target).square().mean().backward()
        assert all(p.grad is None for p in base.parameters() if not p.requires_grad)
        assert all(p.grad is None for p in roles["fake"].parameters())
        grads.append(torch.cat([grad.flatten() for _, grad in gradients(roles["student"])]))
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


def test_merged_weights_are_the_adapted_network() -> None:
    """Catches an adapter on the wrong side of its matrix, or on another layer."""
    base = tiny_network(0)
    student = adapt(base, "student", RANK, seed=0)
    student.to(torch.float64)
    fill_weights(student, 1)
    whole = tiny_network(5)
    whole.load_state_dict(merged(student), strict=True)
    flows = [each(latents("x"), 0.5, conditioning()).flow for each in (student, whole)]
    torch.testing.assert_close(*flows, rtol=0, atol=1e-12)


def base_weights(trainer: Trainer) -> dict[str, Tensor]:
    base = trainer.stage.teacher.base  # type: ignore[attr-defined]
    return {name: p.detach().clone() for name, p in AdaptedNetwork(base).named_parameters()}


def test_only_adapters_are_trained_saved_and_averaged(lora: Callable[..., Config]) -> None:
    """Catches weights that drift below the adapters, and 14B of moments, averages, checkpoints."""
    trainer = build_trainer(lora())
    before = base_weights(trainer)
    start = {turn: each.network.state_dict() for turn, each in trainer.learners.items()}
    start = {turn: {n: t.clone() for n, t in own.items()} for turn, own in start.items()}
    trainer.run()
    after = base_weights(trainer)
    assert all(torch.equal(after[name], before[name]) for name in before)
    for turn, learner in trainer.learners.items():
        now = learner.network.state_dict()
        assert any(not torch.equal(now[name], start[turn][name]) for name in now), turn
        held = [p for each in learner.optimizers for g in each.param_groups for p in g["params"]]
        assert {id(p) for p in held} == {id(p) for p in learner.network.parameters()}
        assert all(".lora_" in name for name in now)
    assert all(".lora_" in name for name in trainer.ema.shadow)
    (checkpoint,) = (run_folder(lora()) / "checkpoints").glob("*")
    stored = {name for file in checkpoint.glob("*.safetensors") for name in load_file(file)}
    assert {name for name in stored if ".lora_" not in name} == set()
    with pytest.raises(WeightsError, match="holds adapters alone"):
        load_network(checkpoint)


def test_a_run_exports_what_the_next_one_begins_with(
    lora: Callable[..., Config], world: Path, tmp_path: Path
) -> None:
    """Catches an exported student that is the teacher, and a chain of recipes that breaks.

    The merged student, the weights with the exported adapter, and what diffusers makes of that
    file are one network.
    """
    config = lora()
    run(config)
    folder = run_folder(config)
    files = {role: folder / f"{role}_adapter.safetensors" for role in ("student", "fake")}
    assert not (folder / "fake.safetensors").exists()
    following = lora("run.name=next", *beginning(files))
    check_start(following)
    networks: dict[str, Any] = dict(build_networks(following, CPU))
    networks["merged"] = load_network(folder / "student.safetensors", dtype=torch.float32)
    networks["diffusers"] = load_network(world / "teacher.safetensors", dtype=torch.float32)
    networks["diffusers"].load_lora_adapter(files["student"])
    flows = answers(networks)
    assert error(flows["student"], flows["teacher"]) > 1e-3
    assert error(flows["fake"], flows["teacher"]) > 1e-3
    assert error(flows["merged"], flows["student"]) < 2e-3  # float16
    assert error(flows["diffusers"], flows["student"]) < 1e-5
    run(following)
    files["student"].write_bytes(files["fake"].read_bytes())
    with pytest.raises(UserError, match=r"weights\.student_adapter: the file is not the one"):
        run(following, resume=True)


def beginning(files: dict[str, Path]) -> list[str]:
    return [f"weights.{role}_adapter={file}" for role, file in files.items()]


def test_resume_is_exact(lora: Callable[..., Config]) -> None:
    """Catches an adapter, moment or average that a checkpoint leaves out.

    A discriminator reads the teacher's blocks, which have adapters of others.
    """
    gan = "gan.weight=0.1"
    whole = build_trainer(lora(gan, "run.name=whole"))
    whole.run()
    build_trainer(lora(gan, "run.name=parts", "run.student_updates=1")).run()
    parts = build_trainer(lora(gan, "run.name=parts"), resume=True)
    parts.run()
    for turn, learner in whole.learners.items():
        wanted = learner.network.state_dict()
        got = parts.learners[turn].network.state_dict()
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert all(torch.equal(parts.ema.shadow[n], s) for n, s in whole.ema.shadow.items())


def test_processes_that_share_weights_and_sequences_train_as_one(
    world: Path, tmp_path: Path
) -> None:
    """Catches frozen weights and adapters that do not get on with sharding or sequences.

    And exports of one process's part, or of another precision: the same in bfloat16.
    """
    given = ["run.stage=dmd", "batch.size=2", "batch.micro=1", "score.fake_per_student=1"]
    given += ["run.student_updates=2", "model.lora_rank=2", "model.activation_checkpointing=full"]
    given += ["optim.student.lr=1e-2", "optim.fake.lr=1e-2"]

    def config(name: str, *more: str) -> Config:
        return config_in(tmp_path, world, *given, f"run.name={name}", *more)

    def work() -> tuple[Trained, None]:
        trained = train_in_float64(config("two", "model.sequence_ranks=2"))
        half = config("half", "model.compute=bfloat16")
        trainer = build_trainer(half)
        trainer.run()
        export(trainer, run_folder(half), half)
        return trained, None

    ranks = in_processes(2, tmp_path / "ranks", work)
    one = train_in_float64(config("one"))
    assert_equal([trained for trained, _ in ranks], one, sequence_ranks=2)
    teacher = load_file(world / "teacher.safetensors")
    student = load_file(tmp_path / "runs" / "half" / "student.safetensors")
    assert student.keys() == teacher.keys()
    for name, weight in teacher.items():  # float16 of a bfloat16 weight is exact but for tiny ones
        change = error(student[name].float(), weight.bfloat16().float())
        assert (change > 1e-4) == (name.startswith("blocks.") and is_matrix(name, weight)), name


def is_matrix(name: str, weight: Tensor) -> bool:
    return weight.ndim == 2 and name.endswith(".weight")


def test_adapters_without_weights_below_are_refused(
    lora: Callable[..., Config], world: Path, tmp_path: Path
) -> None:
    """Catches an adapter that nobody trains, or that belongs to other weights or another rank."""
    path = tmp_path / "adapter.safetensors"
    save_file({"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.zeros(4, 16)}, path)
    adapter = f"weights.student_adapter={path}"
    with pytest.raises(ConfigError, match=r"model\.lora_rank is 0, so no adapter is trained"):
        check_start(lora(adapter, "model.lora_rank=0"))
    with pytest.raises(ConfigError, match=r"both set; .* use weights\.student="):
        check_start(lora(adapter, f"weights.student={world / 'teacher.safetensors'}"))
    with pytest.raises(ConfigError, match="which does not exist"):
        check_start(lora("weights.student_adapter=nowhere.safetensors"))
    with pytest.raises(ConfigError, match="the student starts from nothing"):
        build_networks(lora("run.stage=teacher", "weights.teacher="), CPU)
    with pytest.raises(UserError, match=r"does not fit: .* with model\.lora_rank=2"):
        build_networks(lora(adapter), CPU)
    save_file({"blocks.0.weight": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match=r"no adapter that a run exported: .* blocks\.0"):
        build_networks(lora(adapter), CPU)
