"""A study of students that are given the first latent frame of a real clip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import fill_weights, save_network
from torch import Tensor

from selfforcing_dfd.cli.main import main
from selfforcing_dfd.evaluation.worlds import world_of
from selfforcing_dfd.models.identity import Recipe
from selfforcing_dfd.streaming.session import StreamSession
from selfforcing_dfd.study.plan import load_plan, reference_config
from selfforcing_dfd.study.results import load_study
from selfforcing_dfd.training.build import build_network
from tests.study.conftest import SIZES, one_run_each

ARMS = """
  control: {set: [run.stage=dmd]}
  caption: {set: [dfd.pairing=caption], control: control, stream: true}
"""


def begin_with_a_picture(plan: Path) -> None:
    """Make a plan of image-to-video, and a start's student that is given a frame."""
    one_run_each(plan, ARMS, "given: 1")
    network = build_network(SIZES)
    fill_weights(network, seed=1)
    recipe = Recipe(ladder=(1000, 500), shift=5, chunk_frames=3, frames=6, given=1)
    save_network(plan.parent / "one/student.safetensors", network, "causal_student", recipe)


def test_streams_of_a_study_begin_with_real_pictures(plan: Path, monkeypatch: pytest.MonkeyPatch):
    """Catches a start that cannot be measured, and streams that all begin with one picture."""
    begin_with_a_picture(plan)
    begun: list[Tensor] = []
    reset = StreamSession.reset

    def seen(session: StreamSession, *asked: Any, context: Tensor | None, **more: Any) -> None:
        assert context is not None
        begun.append(context)
        reset(session, *asked, context=context, **more)

    monkeypatch.setattr(StreamSession, "reset", seen)
    assert main(["study", "--plan", str(plan)]) == 0
    study = load_study(plan.parent / "docs" / "study" / "plan.json")
    assert len(study.start_streams["one"]) == 2
    assert len(study.runs_of("caption")[0].stream) == 2

    config = reference_config(load_plan(str(plan)), "one")
    world = world_of(config)
    given = world.draw(config, 2).given
    assert given is not None
    pictures = world.decoder(config)(given)
    assert pictures.shape[:2] == (2, 1)
    of_a_session = [pictures[0], *pictures]  # it is made with the first, then reset for each stream
    assert len(begun) == 6
    for got, wanted in zip(begun, of_a_session * 2, strict=True):
        assert torch.equal(got, wanted)
