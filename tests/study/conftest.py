"""A small study of real runs: two arms, two starts, two draws, two updates."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import fill_weights, save_network

from selfforcing_dfd.config import NetworkConfig
from selfforcing_dfd.training.build import build_network

SIZES = NetworkConfig(num_heads=2, head_dim=8, num_layers=1, ffn_dim=32, freq_dim=16)

BASE = """
run: {{stage: dfd, device: cpu}}
weights: {{teacher: {folder}/teacher.safetensors}}
rollout: {{frames: 6, ladder: [1000, 500]}}
score: {{fake_per_student: 1, guidance: 1}}
regression: {{steps: 1}}
batch: {{size: 4, micro: 4}}
data: {{shards: {folder}/shards, tiny: {{clips: 8, seed: 0, noise_steps: 1}}}}
report: {{teacher_steps: 1}}
"""

PLAN = """
about: Two arms.
base: {folder}/base.yaml
out: {folder}/runs
document: {folder}/docs/study.md
starts: {{one: {folder}/one, two: {folder}/two}}
draws: [0, 1]
updates: 2
every: 1
dmd_updates: 4
clips: 8
follow_clips: 4
evaluation_seed: 2000
budget: control
controls: [control, prefix_first]
fixed:
  prefix_first: {{arm: prefix, update: 1}}
long: 2
stream: {{windows: 2, prompts: 2}}
arms:
  control: {{set: [run.stage=dmd], tried: 3}}
  prefix: {{set: [dfd.pairing=prefix], stream: true}}
"""


def make_study(folder: Path) -> Path:
    """Weights, base and plan in a folder; the plan's path."""
    network = build_network(SIZES)
    weights = {
        "teacher.safetensors": "teacher",
        "one/student.safetensors": "causal_student",
        "one/fake.safetensors": "fake_score",
        "one/causal.safetensors": "causal_teacher",
        "two/student.safetensors": "causal_student",
        "two/fake.safetensors": "fake_score",
        "two/causal.safetensors": "causal_teacher",
    }
    for number, (name, role) in enumerate(weights.items()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        fill_weights(network, seed=number)
        save_network(folder / name, network, role)  # type: ignore[arg-type]
    (folder / "base.yaml").write_text(BASE.format(folder=folder))
    (folder / "plan.yaml").write_text(PLAN.format(folder=folder))
    return folder / "plan.yaml"


def one_run_each(plan: Path, arms: str, rollout: str) -> None:
    """Leave one start, one draw and one update of other arms; rollout: a setting to put there."""
    folder = plan.parent
    text = plan.read_text().replace("draws: [0, 1]", "draws: [0]\ngoal: false")
    text = text.replace("updates: 2\n", "updates: 1\n", 1).replace(", prefix_first]", "]")
    text = text.replace(f"{{one: {folder}/one, two: {folder}/two}}", f"{{one: {folder}/one}}")
    text = text[: text.index("fixed:")] + "stream: {windows: 2, prompts: 2}\n"
    plan.write_text(f"{text}arms:\n{arms}")
    base = plan.with_name("base.yaml")
    base.write_text(base.read_text().replace("{frames: 6,", f"{{frames: 6, {rollout},"))


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    return make_study(tmp_path)
