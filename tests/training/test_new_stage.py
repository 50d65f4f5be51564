"""A new stage is one file: here it is, and everything that asks a stage takes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pytest
from safetensors.torch import load_file
from torch import Tensor, nn

from selfforcing_dfd.cli.train import run
from selfforcing_dfd.config import Config, ConfigError, ranged
from selfforcing_dfd.context import Conditioning
from selfforcing_dfd.data.shards import Batch
from selfforcing_dfd.objectives import flow_matching
from selfforcing_dfd.rng import Draw
from selfforcing_dfd.stages import STAGES, load_config
from selfforcing_dfd.stages.base import Stage, StageLoss, TrainingStage, register
from selfforcing_dfd.training.folders import run_folder
from selfforcing_dfd.training.plan import plan


@dataclass(frozen=True, kw_only=True, slots=True)
class ToyConfig:
    sigma: float = ranged(0.5, 0, 1)


@dataclass(slots=True)
class ToyStage(TrainingStage):
    """Flow matching at a single noise level."""

    name = "toy"
    sections = {"toy": ToyConfig}
    makes = "teacher"

    trained: dict[str, nn.Module]
    sigma: float

    @classmethod
    def build(
        cls, config: Config, networks: Mapping[str, nn.Module], negative: Tensor | None
    ) -> Self:
        return cls({"student": networks["student"]}, config.of(ToyConfig).sigma)

    @classmethod
    def describe(cls, config: Config) -> Iterator[tuple[str, str]]:
        yield "toy", f"sigma {config.of(ToyConfig).sigma:g}"

    def loss(self, turn: str, batch: Batch, draw: Draw, student_updates: int) -> StageLoss:
        noise = draw.normal("noise", batch.latents.shape[1:], batch.latents)
        sigma = batch.latents.new_full((len(batch.latents),), self.sigma)
        student, text = self.trained[turn], Conditioning(batch.text)
        loss = flow_matching(student, batch.latents, noise, sigma, text)
        return StageLoss(loss.mean(), {"flow_loss": loss.detach()})


@pytest.fixture
def toy() -> Iterator[type[Stage]]:
    """The stage, known for one test."""
    yield register(ToyStage)
    del STAGES["toy"]


def test_a_stage_in_one_file_is_configured_planned_and_run(
    toy: type[Stage], settings: Callable[..., Config]
) -> None:
    """Catches a part that knows the stages by name: it would refuse or skip a new one."""
    config = settings("run.stage=toy", "toy.sigma=0.25", "run.student_updates=2")
    assert config.of(ToyConfig).sigma == 0.25
    text = plan(config)
    assert "toy         sigma 0.25" in text
    assert "updates     2 of the student" in text
    run(config)
    weights = load_file(run_folder(config) / "student.safetensors")
    assert weights["blocks.0.attn1.to_q.weight"].isfinite().all()


def test_its_settings_have_ranges_and_are_unknown_without_it(
    toy: type[Stage], settings: Callable[..., Config], tmp_path: Path
) -> None:
    """Catches a section that is taken without its stage, or without its ranges."""
    with pytest.raises(ConfigError, match=r"toy\.sigma is 2\.0; it must be"):
        settings("run.stage=toy", "toy.sigma=2.0")
    sections = {field.name for field in dataclasses.fields(ToyConfig)}
    assert sections == {"sigma"}
    del STAGES["toy"]
    (tmp_path / "toy.yaml").write_text("run: {stage: dmd}\ntoy: {sigma: 0.5}\n")
    with pytest.raises(ConfigError, match=r"toy"):
        load_config(str(tmp_path / "toy.yaml"))
    register(toy)
