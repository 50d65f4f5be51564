"""A protocol of four methods, three prompts and two seeds, with random networks of tiny size."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import fill_weights, save_network

from selfforcing_dfd.config import NetworkConfig
from selfforcing_dfd.protocol.prepared import prepare
from selfforcing_dfd.protocol.report import write_report
from selfforcing_dfd.protocol.work import Worker, run_tasks
from selfforcing_dfd.training.build import build_network

SIZES = NetworkConfig(num_heads=2, head_dim=8, num_layers=1, ffn_dim=32, freq_dim=16)

PLAN = """
about: Random networks.
out: {folder}/out
prompts: [a red disc moves, a blue square moves, a green cross moves]
seeds: [1, 2]
latent_frames: 3
methods:
  data: {{kind: tiny_data, about: the law}}
  teacher: {{kind: teacher, weights: {folder}/teacher.safetensors, steps: 1}}
  one: {{kind: student, weights: {folder}/one.safetensors}}
  two: {{kind: student, weights: {folder}/two.safetensors}}
  absent: {{kind: student, about: not trained yet, weights: {folder}/absent.safetensors}}
teacher: teacher
data: data
control: one
features: [pixels, clip={folder}/no_clip]
window_s: 0.25
paper:
  source: a table that was made up
  columns: {{TF: temporal_flicker, SC: "", average: average}}
  rows:
    two: {{TF: 0.75, SC: 0.5, average: 0.625}}
    absent: {{TF: 0.25}}
"""
ROLES = {
    "teacher": "teacher",
    "causal": "causal_teacher",
    "one": "causal_student",
    "two": "causal_student",
}


def make_protocol(folder: Path) -> Path:
    """Weights and plan in a folder; the plan's path."""
    network = build_network(SIZES)
    for number, (name, role) in enumerate(ROLES.items()):
        fill_weights(network, seed=number)
        save_network(folder / f"{name}.safetensors", network, role)  # type: ignore[arg-type]
    (folder / "plan.yaml").write_text(PLAN.format(folder=folder))
    return folder / "plan.yaml"


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(plan of a protocol that has been run, what it printed). Tests leave it as it is."""
    plan = make_protocol(tmp_path_factory.mktemp("protocol"))
    prepared = prepare(str(plan))
    assert run_tasks(Worker(prepared, "cpu").tasks("all")) == []
    return plan, write_report(prepared)


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    return make_protocol(tmp_path)
