"""Recipes by name: what they set, and what comes after them."""

from __future__ import annotations

import pytest
from tiny_models import tiny_network

from selfforcing_dfd.config import ConfigError
from selfforcing_dfd.stages import arms_of, change, load_config, stage_of
from selfforcing_dfd.stages.regression import RegressionConfig

CAUSAL = "weights.causal=causal.safetensors"


def test_a_preset_is_its_settings():
    """Catches a name that is noted and does nothing."""
    config = load_config("dfd_ar", [CAUSAL, "dfd.preset=stable"])
    assert config.run.stage == "regression"
    assert config.rollout.noise == "kept"
    assert config.weights.student == ""
    assert config.of(RegressionConfig).target == "next_step"


def test_settings_after_a_preset_win_and_those_before_do_not():
    """Catches a preset that is merged last, or only first."""
    after = load_config("dfd_ar", [CAUSAL, "dfd.preset=stable", "regression.target=clip"])
    before = load_config("dfd_ar", [CAUSAL, "regression.target=clip", "dfd.preset=stable"])
    assert after.of(RegressionConfig).target == "clip"
    assert before.of(RegressionConfig).target == "next_step"


def test_a_file_may_name_a_preset(tmp_path):
    """Catches presets that only overrides can name, and files that silently undo one."""
    file = tmp_path / "own.yaml"
    file.write_text(
        "base: dfd_ar.yaml\ndfd: {preset: stable}\nweights: {causal: c.safetensors}\narms: {}\n"
    )
    assert load_config(str(file)).run.stage == "regression"
    assert load_config(str(file), ["regression.steps=4"]).of(RegressionConfig).steps == 4
    assert load_config(str(file), ["run.stage=dmd", "dfd.preset="]).run.stage == "dmd"


def test_an_arm_may_name_a_preset(tmp_path):
    """Catches arms whose overrides are taken as they stand."""
    file = tmp_path / "own.yaml"
    file.write_text(
        "base: dfd_ar.yaml\nweights: {causal: c.safetensors}\n"
        "arms: {control: [run.stage=dmd], stable: [dfd.preset=stable, regression.steps=2]}\n"
    )
    arms = {arm.run.name.rpartition("/")[2]: arm for arm in arms_of(load_config(str(file)))}
    control, stable = arms["control"], arms["stable"]
    assert (control.run.stage, control.rollout.noise) == ("dmd", "fresh")
    assert (stable.run.stage, stable.rollout.noise) == ("regression", "kept")
    assert stable.of(RegressionConfig).steps == 2


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"dfd\.preset is 'stabel'; use one of stable"):
        change(load_config("dfd_ar"), ["dfd.preset=stabel"])


@pytest.mark.parametrize("stage", ["dmd", "dfd", "regression"])
@pytest.mark.parametrize("noise", ["fresh", "kept"])
def test_every_stage_of_a_student_takes_its_noise_from_the_recipe(stage: str, noise: str):
    """Catches training on rollouts that the exported recipe does not describe."""
    config = load_config("dfd_ar", [f"run.stage={stage}", f"rollout.noise={noise}", CAUSAL])
    networks = {role: tiny_network() for role in ("student", "teacher", "fake", "causal")}
    built = stage_of(config).build(config, networks, None)
    assert built.keeps_noise is (noise == "kept")
