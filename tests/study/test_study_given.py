"""A study of students that are given the first latent frame of a real clip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import fill_weights
from torch import Tensor

from selfforcing_dfd.cli.main import main
from selfforcing_dfd.evaluation.worlds import world_of
from selfforcing_dfd.models.identity import Identity, Recipe
from selfforcing_dfd.streaming.session import StreamSession
from selfforcing_dfd.study.plan import load_plan, reference_config
from selfforcing_dfd.study.results import load_study
from selfforcing_dfd.training.build import build_network
from selfforcing_dfd.weights.tensors import save_weights
from selfforcing_dfd.weights.write import file_metadata
from tests.study.conftest import SIZES

ARMS = """arms:
  control: {set: [run.stage=dmd]}
  caption: {set: [dfd.pairing=caption], control: control, stream: true}
"""


def begin_with_a_picture(plan: Path) -> None:
    """Make a plan of one start and draw of image-to-video, streams of two training lengths."""
    text = plan.read_text().replace("draws: [0, 1]", "draws: [0]\ngoal: false")
    text = text.replace("updates: 2\n", "updates: 1\n", 1).replace(", prefix_first]", "]")
    folder = plan.parent
    text = text.replace(f"{{one: {folder}/one, two: {folder}/two}}", f"{{one: {folder}/one}}")
    plan.write_text(text[: text.index("fixed:")] + "stream: {windows: 2, prompts: 2}\n" + ARMS)
    base = plan.with_name("base.yaml")
    base.write_text(base.read_text().replace("{frames: 6,", "{frames: 6, given: 1,"))
    network = build_network(SIZES)
    fill_weights(network, seed=1)
    recipe = Recipe(ladder=(1000, 500), shift=5, chunk_frames=3, frames=6, given=1)
    identity = Identity("causal_student", recipe=recipe)
    save_weights(
        folder / "one/student.safetensors", network, file_metadata(network.config, identity)
    )


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
