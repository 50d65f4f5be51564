"""Training on a CUDA device: 16 bits, activation checkpointing, memory against the estimate."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from rehearsal import DEVICE, ON_GPU, allocated, peak_of
from tiny_models import save_network

from selfforcing_dfd.common import shipped
from selfforcing_dfd.config import Config, NetworkConfig
from selfforcing_dfd.data.sources.tiny import make_tiny_shards
from selfforcing_dfd.stages import load_config
from selfforcing_dfd.training.build import build_network, build_trainer
from selfforcing_dfd.training.memory import Spread
from selfforcing_dfd.training.plan import estimate_of
from selfforcing_dfd.training.sharding import keep_gathered

pytestmark = pytest.mark.gpu
WIDE = NetworkConfig(num_heads=4, head_dim=128, num_layers=6, ffn_dim=2048, text_dim=32)
NARROW = NetworkConfig(num_heads=2, head_dim=32, num_layers=2, ffn_dim=64, text_dim=32)
SIZE = WIDE if ON_GPU else NARROW
CLOSE = 0.15  # share by which an estimate may be wrong, as on a CPU
BF16 = "model.compute=bfloat16"
CHECKPOINTING = ("none", "selective", "full")
Make = Callable[..., Config]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A config of data-forcing distillation on tiny clips of two chunks, on this device."""
    folder = tmp_path_factory.mktemp("training")
    network = build_network(SIZE)
    network.init_weights(torch.Generator().manual_seed(0))
    torch.nn.init.normal_(network.proj_out.weight, std=0.02)
    save_network(folder / "teacher.safetensors", network)
    make_tiny_shards(folder / "shards", 8, 0, "short", 6, shipped("assets/tiny/codec.safetensors"))
    recipe = folder / "config.yaml"
    recipe.write_text("run: {stage: dfd, student_updates: 1}\n")
    settings = [
        f"weights.teacher={folder / 'teacher.safetensors'}",
        f"data.shards={folder / 'shards'}",
        f"run.out={folder}",
        f"run.device={DEVICE}",
        "rollout.frames=6",
        "batch.size=4",
        "batch.micro=4",
        "score.guidance=2",
        "model.attention=sdpa",
    ]
    return lambda *overrides: load_config(str(recipe), [*settings, *overrides])


def turns(config: Config) -> dict[str, tuple[float, float]]:
    """Loss and norm of the gradient of the first update of each network."""
    trainer = build_trainer(config)
    keep_gathered(trainer.learners["student"].network)
    found = {}
    for turn in ("fake", "student"):
        values = trainer.take_turn(turn, trainer.stream())
        found[turn] = (values["loss"], values["grad_norm"])
    return found


@pytest.mark.parametrize("overrides", [(), ("model.compile=true",)], ids=["plain", "compiled"])
def test_16_bits_train_as_float32_on_a_cpu(make: Make, overrides: tuple[str, ...]):
    """Catches a rollout, a mask or a cast that is another on a GPU.

    On a CPU bfloat16 moves losses and norms of gradients by 7e-4. Ten times that is allowed.
    """
    if not ON_GPU:
        overrides = ()
    torch._dynamo.reset()
    wanted = turns(make("run.device=cpu"))
    for turn, (loss, norm) in turns(make(BF16, *overrides)).items():
        assert loss == pytest.approx(wanted[turn][0], rel=7e-3), turn
        assert norm == pytest.approx(wanted[turn][1], rel=7e-3), turn


def test_float32_trains_as_on_a_cpu(make: Make):
    """Catches what rounding to 16 bits would hide. Convolutions may take TF32: .001."""
    wanted = turns(make("run.device=cpu"))
    for turn, found in turns(make()).items():
        assert found == pytest.approx(wanted[turn], rel=5e-3), turn


def test_checkpointing_changes_memory_and_no_gradient(make: Make):
    """Catches a block that runs again with other inputs, and one that is kept all the same.

    A gradient's sums may have another order in each pass of a GPU.
    """
    found = {}
    peaks = {}
    for what in CHECKPOINTING:
        checkpointing = f"model.activation_checkpointing={what}"
        config = make(BF16, checkpointing, "batch.size=8", "batch.micro=8")
        before = allocated()

        def train(what: str = what, config: Config = config) -> None:
            found[what] = turns(config)

        peaks[what] = peak_of(train) - before
    for what in CHECKPOINTING[1:]:
        for turn, values in found[what].items():
            assert values == pytest.approx(found["none"][turn], rel=1e-2), (what, turn)
    if ON_GPU:
        assert peaks["none"] > peaks["selective"] > peaks["full"]


@pytest.mark.parametrize("what", CHECKPOINTING)
@pytest.mark.parametrize("compute", ["bfloat16", "float32"])
def test_memory_is_what_dry_run_says(make: Make, compute: str, what: str):
    """Catches tensors that live longer on a GPU than the estimate thinks."""
    config = make(f"model.compute={compute}", f"model.activation_checkpointing={what}")
    estimate = estimate_of(config)
    assert estimate is not None
    spread = Spread(estimate, 1)
    use_libraries_once()
    before = allocated()
    trainer = build_trainer(config)
    keep_gathered(trainer.learners["student"].network)
    for turn in ("fake", "student"):  # makes the optimizers' moments
        trainer.take_turn(turn, trainer.stream())
    for turn, passes in estimate.passes.items():
        phases = spread.turn(turn, passes).values()
        most = max(sum(phase.values()) for phase in phases)
        estimated = sum(spread.lasting().values()) + most
        measured = peak_of(lambda turn=turn: trainer.take_turn(turn, trainer.stream())) - before
        if ON_GPU:
            assert measured == pytest.approx(estimated, rel=CLOSE), turn
        assert estimated > 0


def use_libraries_once() -> None:
    """What cuBLAS and cuDNN allocate for good belongs to no network."""
    x = torch.randn(256, 256, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    (x @ x).sum().backward()
    picture = torch.randn(1, 4, 1, 8, 8, device=DEVICE, dtype=torch.bfloat16)
    torch.nn.functional.conv3d(picture, picture.expand(4, 4, 1, 8, 8))
