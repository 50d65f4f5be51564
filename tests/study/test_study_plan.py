"""Plans: the shipped ones can be run, and mistakes are named with their cure."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from selfforcing_dfd.common import shipped
from selfforcing_dfd.config import ConfigError
from selfforcing_dfd.stages import stage_of
from selfforcing_dfd.study.plan import BASE, StudyRun, load_plan, runs_of
from selfforcing_dfd.study.starts import config_of, outputs
from selfforcing_dfd.training.folders import run_folder

NAMES = sorted(path.stem for path in shipped("configs/study").glob("*.yaml"))
PLANS = [name for name in NAMES if not name.startswith(BASE)]


@cache
def shipped_runs(name: str) -> list[StudyRun]:
    return runs_of(load_plan(name))


@pytest.mark.parametrize("name", PLANS)
def test_shipped_plans_can_be_run(name: str):
    """Catches an arm with a setting that is no more, and one without a point at equal updates.

    But for arms of a shorter dose, which end there.
    """
    plan = load_plan(name)
    runs = shipped_runs(name)
    assert len({run.result for run in runs}) == len(runs)
    by_arm = {run.arm: run for run in runs}
    for arm, arm_plan in plan.arms.items():
        ends_early = arm.endswith("_dose") and by_arm[arm].updates[-1] < plan.updates
        assert plan.updates in by_arm[arm].updates or arm_plan.family or ends_early, arm
    for fixed in plan.fixed.values():
        assert fixed.update in by_arm[fixed.arm].updates
    for run in runs:
        assert stage_of(run.config).makes == "causal_student", run.arm
        assert run.updates[-1] == run.config.run.student_updates


@pytest.mark.parametrize("name", PLANS)
def test_every_start_is_shipped_or_made(name: str):
    """Catches a plan that only its author can run, for want of weights that nothing makes."""
    plan = load_plan(name)
    made: set[str] = set()
    for stage in plan.made:
        config = config_of(stage)
        needs = {start.path for start in stage_of(config).starts(config).values()}
        assert not {path for path in needs if not shipped(path).exists()} - made
        made |= {str(path) for path in outputs(stage, config)}
        made |= {f"{run_folder(config)}/{role}.safetensors" for role in ("student", "fake")}
    for run in shipped_runs(name):
        needs = {start.path for start in stage_of(run.config).starts(run.config).values()}
        assert not {path for path in needs if not shipped(path).exists()} - made, run.name


def test_seeds_starts_and_lengths_of_runs(plan: Path):
    """Catches two draws with one seed, a start's weights in another start's run, a short long run.

    An arm of fewer draws has the first ones.
    """
    text = plan.read_text().replace("tried: 3", "tried: 3, long: true, every: 2")
    plan.write_text(text.replace("stream: true}", "stream: true, draws: 1}"))
    runs = {(run.start, run.draw, run.arm): run for run in runs_of(load_plan(str(plan)))}
    assert set(runs) == {
        *((start, draw, "control") for start in ("one", "two") for draw in (0, 1)),
        ("one", 0, "prefix"),
        ("two", 0, "prefix"),
        ("one", 0, "control_long"),
        ("two", 0, "control_long"),
    }
    assert [runs["one", draw, "control"].config.run.seed for draw in (0, 1)] == [0, 1]
    # an arm that takes nothing of its start must not be one run counted twice
    assert [runs["two", draw, "control"].config.run.seed for draw in (0, 1)] == [100, 101]
    for (start, _, _), run in runs.items():
        assert run.config.weights.student == str(plan.parent / start / "student.safetensors")
        assert run.config.weights.fake == str(plan.parent / start / "fake.safetensors")
        assert run.config.weights.causal == str(plan.parent / start / "causal.safetensors")
    assert runs["two", 0, "control"].updates == (2,)
    assert runs["two", 0, "control_long"].updates == (4,)
    assert runs["two", 0, "control_long"].config.run.student_updates == 4
    assert runs["two", 0, "prefix"].updates == (1, 2)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("clips: 8", "clip: 8", "Key 'clip' not in 'Plan'"),
        ("clips: 8", "clips: many", "clips"),
        ("updates: 2\n", "", "updates is not set"),
        ("budget: control", "budget: other", "no arm other; the arms are control, prefix"),
        ("controls: [control", "controls: [caption", "no arm caption"),
        ("  prefix_first:", "  prefix:", "prefix is the name of another row"),
        ("  prefix: {set", "  teacher: {set", "teacher is the name of another row"),
        ("  control: {set", "  control: {like: prefix, set", "like prefix, which is no arm above"),
        ("long: 2", "long: 1", "long is 1; lengthened arms need 2 or more"),
        ("draws: [0, 1]", "draws: []", "starts or draws are empty"),
        ("tried: 3", "draws: 3", "control has draws: 3; use 0 \\(all\\) to 2"),
        ("{one:", "{one/two:", "one/two is no name"),
        ("dfd.pairing=prefix", "dfd.pairing=nothing", "arm prefix: .*pairing"),
        ("run.stage=dmd", "run.stage=nothing", "arm control: run.stage is 'nothing'"),
    ],
)
def test_mistakes_in_a_plan_are_named(plan: Path, old: str, new: str, message: str):
    """Catches a typing mistake that costs a night: it is found before anything is trained."""
    assert old in plan.read_text()
    plan.write_text(plan.read_text().replace(old, new, 1))
    with pytest.raises(ConfigError, match=message):
        runs_of(load_plan(str(plan)))


def test_only_wanted_points_are_measured(plan: Path):
    """Catches points that are measured without being wanted, or wanted without a checkpoint."""
    text = plan.read_text()
    plan.write_text(text.replace("tried: 3", "tried: 3, every: 1, points: [2]"))
    arm = next(name for name, each in load_plan(str(plan)).arms.items() if each.points)
    runs = [run for run in runs_of(load_plan(str(plan))) if run.arm == arm]
    assert {run.updates for run in runs} == {(2,)}
    plan.write_text(text.replace("tried: 3", "tried: 3, every: 2, points: [1]"))
    with pytest.raises(ConfigError, match=r"to be measured at \[1\], but has checkpoints at \[2"):
        runs_of(load_plan(str(plan)))
