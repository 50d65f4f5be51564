"""Two and four processes train as one does on the same samples: data, draws, losses, weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo import in_processes
from processes import (
    FLOAT32,
    STAGES,
    TOLERANCE,
    Trained,
    assert_equal,
    assert_same_metrics,
    config_of,
    error,
    in_turn,
    train_in_float64,
    trained_once,
)
from safetensors.torch import load_file
from tiny_models import tiny_network
from torch.distributed.tensor import DTensor, distribute_tensor

from selfforcing_dfd import rng
from selfforcing_dfd.cli.train import run
from selfforcing_dfd.common import Interrupted
from selfforcing_dfd.config import Config, ConfigError
from selfforcing_dfd.data.format import PackError
from selfforcing_dfd.processes.world import World, find_world
from selfforcing_dfd.stages import pairs
from selfforcing_dfd.stages.pairs import PairsStage
from selfforcing_dfd.training.agreement import DisagreementError
from selfforcing_dfd.training.build import build_trainer, check_batch
from selfforcing_dfd.training.clock import Clock
from selfforcing_dfd.training.muon import Muon
from selfforcing_dfd.training.sharding import Sharding
from selfforcing_dfd.weights.tensors import whole

IN_THREADS = "checkpoint.background=always"
BY_FOUR = {"caption": ["model.shard_ranks=2"], "causal": ["model.shard_ranks=1"]}


@pytest.fixture(scope="module")
def make(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Config]:
    """A config by the name of a stage, in a run folder of its own."""
    return partial(config_of, tmp_path_factory.mktemp("configs"), world)


@pytest.fixture(scope="module")
def alone(make: Callable[..., Config]) -> Callable[[str], Trained]:
    """The run of one process, made once for each stage."""
    return trained_once(make)


@pytest.fixture(scope="module")
def two(
    make: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Trained]]:
    """The runs of two processes by stage, for each of them. All stages share one start."""

    def work() -> dict[str, Trained]:
        return {stage: train_in_float64(make(stage, "two")) for stage in STAGES}

    return in_processes(2, tmp_path_factory.mktemp("two") / "messages", work)


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_train_as_one(
    stage: str, two: list[dict[str, Trained]], alone: Callable[[str], Trained]
) -> None:
    """Catches a rank that reads or draws what another does, and a gradient that misses a rank.

    Also one that counts ranks twice, a mean over one rank's samples, an average (EMA) or a
    parameter that differs between ranks. Gradients are compared as AdamW's exp_avg, which is the
    last gradient, as its beta1 is 0; and by their norm at each update.
    """
    assert_equal([each[stage] for each in two], alone(stage))


@pytest.mark.parametrize("stage", BY_FOUR)
def test_four_processes_train_as_one(
    stage: str, make: Callable[..., Config], alone: Callable[[str], Trained], tmp_path: Path
) -> None:
    """Catches copies of the weights that do not hear of each other's gradients.

    Pairs of processes hold the weights together, or each of them holds all.
    """
    config = make(stage, "four", *BY_FOUR[stage])
    assert_equal(in_processes(4, tmp_path / "four", lambda: train_in_float64(config)), alone(stage))


def test_the_number_of_processes_may_change_on_resume(
    make: Callable[..., Config], alone: Callable[[str], Trained], tmp_path: Path
) -> None:
    """Catches a checkpoint, a place in the data or a draw that belongs to a number of processes."""
    two = in_processes(
        2,
        tmp_path / "two",
        lambda: train_in_float64(make("caption", "resumed", "run.student_updates=2", IN_THREADS)),
    )
    one = train_in_float64(make("caption", "resumed", "run.student_updates=3"), resume=True)
    four = in_processes(
        4, tmp_path / "four", lambda: train_in_float64(make("caption", "resumed"), resume=True)
    )
    seen = in_turn([each.seen for each in two]) + one.seen + in_turn([each.seen for each in four])
    wanted = alone("caption")
    assert seen == wanted.seen
    for name, tensor in wanted.tensors.items():
        tolerance = FLOAT32 if name.startswith("ema") else TOLERANCE
        assert error(four[3].tensors[name], tensor) < tolerance, name
    assert_same_metrics(four[0].metrics, wanted.metrics)


def test_a_stop_asked_of_one_rank_stops_all_after_the_same_turn(
    make: Callable[..., Config], tmp_path: Path
) -> None:
    """Catches a rank that saves and leaves while the others begin another turn without it."""

    def work() -> Clock:
        trainer = build_trainer(make("dmd", "stopped"))
        trainer.stop_requested = trainer.world.rank == 1
        with pytest.raises(Interrupted, match="saved at student update 0 of 5"):
            trainer.run()
        return trainer.clock

    assert in_processes(2, tmp_path / "two", work) == [Clock(fake_updates=1, samples=4)] * 2


def test_ranks_that_train_something_else_are_named(
    make: Callable[..., Config], tmp_path: Path
) -> None:
    """Catches a node that was started with other settings, and a copy of the weights that drifts.

    Both would train on, and nobody would know what.
    """

    def start() -> str:
        seed = f"run.seed={int(dist.get_rank() == 2)}"
        with pytest.raises(DisagreementError) as other_settings:
            build_trainer(make("clip", "other", "batch.size=6", seed))
        return str(other_settings.value)

    for message in in_processes(3, tmp_path / "three", start):
        assert re.search(r"settings: rank 2 \w+, others \w+", message)
        assert "rank 1" not in message

    def drift() -> str:
        trainer = build_trainer(make("clip", "drift", "model.shard_ranks=1"))
        trainer.check_agreement()
        if trainer.world.rank == 1:
            with torch.no_grad():
                next(trainer.learners["student"].network.parameters()).to_local()[0] += 1e-3
        with pytest.raises(DisagreementError) as drifted:
            trainer.run()
        return str(drifted.value)

    for message in in_processes(2, tmp_path / "two", drift):
        assert "norm of the student's weights, part 0: rank 1" in message


@pytest.mark.parametrize("stage", ["caption", "pairs"])
def test_a_whole_run_writes_what_one_process_writes(
    stage: str, make: Callable[..., Config], tmp_path: Path
) -> None:
    """Catches files that two processes write at once, or not at all, and exports of one's part."""
    pairs = ["run.stage=pairs", "pairs.steps=2", "batch.micro=4"] if stage == "pairs" else []
    folders = []
    for name in ("one", "two"):
        out = tmp_path / name
        settings = ["run.student_updates=1", f"pairs.out={out / 'pairs'}", f"run.out={out}", *pairs]
        config = make("caption", "whole", *settings)
        if name == "one":
            run(config)
        else:
            in_processes(2, tmp_path / "messages", lambda config=config: run(config))
        folders.append(out)
    one, two = (sorted(path.relative_to(out) for path in out.rglob("*")) for out in folders)
    # each process writes its part of a checkpoint
    assert [path for path in one if "checkpoints" not in path.parts] == [
        path for path in two if "checkpoints" not in path.parts
    ]
    for path in (path for path in one if path.suffix in (".tar", ".safetensors")):
        if "checkpoints" in path.parts:
            continue
        files = [out / path for out in folders]
        if path.suffix == ".tar":
            assert files[0].read_bytes() == files[1].read_bytes()
            continue
        wanted, got = (load_file(file) for file in files)
        for tensor in wanted:  # float32 gradients and float16 exports
            torch.testing.assert_close(got[tensor], wanted[tensor], rtol=2e-3, atol=1e-4)


def test_all_processes_make_pairs_and_go_on_after_a_failure(
    make: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches pairs that one process makes alone, makes twice, or writes in another order.

    Of 24 pairs in 6 batches and 3 shards, the second process fails at its second batch. What the
    first one wrote until then stays. The files are those of one process.
    """
    monkeypatch.setattr(PairsStage, "pairs_per_shard", 8)
    original, made = pairs.make_pairs, []

    def watched(config: Config, teacher: Any, reader: Any, numbers: range) -> Any:
        if fails and numbers.start == 12:
            raise RuntimeError("out of memory")
        made.append(numbers.start)
        return original(config, teacher, reader, numbers)

    monkeypatch.setattr(pairs, "make_pairs", watched)

    def go(config: Config, resume: bool = False) -> list[int]:
        run(config, resume)
        return made

    settings = ["run.stage=pairs", "pairs.steps=2", "batch.micro=4"]
    one = make("clip", "one", *settings, f"pairs.out={tmp_path / 'one'}")
    two = make("clip", "two", *settings, f"pairs.out={tmp_path / 'two'}")
    fails = False
    assert go(one) == [0, 4, 8, 12, 16, 20]
    made.clear()
    fails = True
    with pytest.raises(AssertionError, match=r"(?s)out of memory\nmade on rank 1"):
        in_processes(2, tmp_path / "broken", lambda: go(two))
    fails = False
    assert in_processes(2, tmp_path / "again", lambda: go(two, resume=True)) == [[8, 16], [12, 20]]
    for path in (tmp_path / "one").iterdir():
        assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes()


def test_what_pairs_are_refused_for_is_said_by_all_processes(
    make: Callable[..., Config], tmp_path: Path
) -> None:
    """Catches helpers that wait for ever, since the first process alone looks at the folder."""
    folder = tmp_path / "taken"
    (folder / "mine").mkdir(parents=True)
    config = make("clip", "taken", "run.stage=pairs", "pairs.steps=2", f"pairs.out={folder}")

    def refused() -> str:
        with pytest.raises(PackError) as error:
            run(config)
        return str(error.value)

    for message in in_processes(2, tmp_path / "two", refused):
        assert f"{folder} exists" in message


def test_a_batch_that_does_not_divide_is_refused(make: Callable[..., Config]) -> None:
    """Catches samples that no process trains on, or that two do."""
    config = make("clip", "batch", "batch.size=6")
    check_batch(config, World(0, 3))
    with pytest.raises(ConfigError, match=r"batch\.size is 6, but 4 processes.*batch\.size=8"):
        check_batch(config, World(0, 4))


@pytest.mark.parametrize("ranks", [0, 1])
def test_muon_steps_as_it_does_on_whole_matrices(ranks: int, tmp_path: Path) -> None:
    """Catches an orthogonal part of a matrix in place of a part of the orthogonal matrix.

    Bit for bit: the same matrices enter torch's own step.
    """

    def steps(world: World) -> list[torch.Tensor]:
        network = tiny_network(0, torch.float32)
        Sharding(world, ranks).apply(network, is_trained=True)
        matrices = [p for p in network.parameters() if p.ndim == 2 and p.shape[0] > 12]
        kind = Muon if world.size > 1 else torch.optim.Muon
        optimizer = kind(matrices, lr=0.1)
        for step in range(2):
            for n, matrix in enumerate(matrices):
                gradient = rng.normal(tuple(matrix.shape), step, f"gradient {n}")
                matrix.grad = as_sharded(gradient, matrix)
            optimizer.step()
        return [whole(matrix) for matrix in matrices]

    alone = steps(World())
    for rank in in_processes(2, tmp_path / "two", lambda: steps(find_world("cpu"))):
        assert all(torch.equal(got, wanted) for got, wanted in zip(rank, alone, strict=True))


def as_sharded(whole_tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if not isinstance(like, DTensor):
        return whole_tensor
    return distribute_tensor(whole_tensor, like.device_mesh, like.placements)
