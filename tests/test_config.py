"""Settings: every mistake is named with its cure, and every file in configs/ loads."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import get_type_hints

import pytest
from omegaconf import OmegaConf

from selfforcing_dfd.common import find_file, shipped
from selfforcing_dfd.config import ConfigError, OptimizerConfig, TinyDataConfig, as_dict
from selfforcing_dfd.stages import STAGES, arms_of, load_config, stage_of
from selfforcing_dfd.stages.config_files import OWN_SECTIONS, change, to_yaml, training_configs
from selfforcing_dfd.stages.dfd import DFDConfig
from selfforcing_dfd.stages.score import ScoreConfig
from selfforcing_dfd.streaming.load import load_settings

STREAM_CONFIGS = sorted(shipped("configs/stream").glob("*.yaml"))
CONFIGS = sorted(training_configs().values())

MINIMAL = """
run: {name: tried, stage: dmd}
weights: {teacher: teacher.safetensors}
data: {shards: shards}
"""

SECTIONS = {name: kind for name, kind in OWN_SECTIONS.items() if dataclasses.is_dataclass(kind)}
SECTIONS |= {name: kind for stage in STAGES.values() for name, kind in stage.sections.items()}
SECTIONS |= {"optim.student": OptimizerConfig, "data.tiny": TinyDataConfig}


@pytest.fixture
def minimal(tmp_path: Path) -> str:
    (tmp_path / "minimal.yaml").write_text(MINIMAL)
    return str(tmp_path / "minimal.yaml")


@pytest.mark.parametrize(
    "path", CONFIGS, ids=lambda path: str(path.relative_to(shipped("configs")))
)
def test_shipped_config_loads(path: Path) -> None:
    """Catches a shipped config with a setting that was renamed."""
    config = load_config(str(path.relative_to(shipped("configs"))))
    for overrides in config.arms.values():
        change(config, overrides)


@pytest.mark.parametrize("path", STREAM_CONFIGS, ids=lambda path: path.stem)
def test_shipped_stream_settings_load(path: Path) -> None:
    """Catches the same in the options of inference/stream.py."""
    load_settings(path.stem)


def test_round_trip(minimal: str, tmp_path: Path) -> None:
    """Catches a setting that is lost in the YAML: the run would resume as another run."""
    config = load_config(
        minimal,
        ["dfd.p=0.25", "optim.fake.lr=3e-5", "rollout.ladder=[1000,500]", "dfd.pairing=inversion"],
    )
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(str(tmp_path / "again.yaml")) == config


def test_override_beats_file_beats_default(minimal: str) -> None:
    """Catches a merge in the wrong order of precedence, which gives no error."""
    config = load_config(minimal, ["run.stage=dfd"])
    assert (config.run.stage, config.run.name, config.run.seed) == ("dfd", "tried", 0)


def test_base_is_changed_by_the_file_that_names_it(minimal: str, tmp_path: Path) -> None:
    """Catches a recipe with `base:` that loses what it does not mention."""
    (tmp_path / "child.yaml").write_text("base: minimal.yaml\nrun: {seed: 7}\n")
    config = load_config(str(tmp_path / "child.yaml"))
    assert (config.run.seed, config.run.name, config.weights.teacher) == (
        7,
        "tried",
        "teacher.safetensors",
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dfd.pp=1", r"dfd\.pp: Key 'pp' not in 'DFDConfig'.*Did you mean: 'p'"),
        ("optim.student.lrr=1", r"optim\.student\.lrr: .*Did you mean: 'lr'"),
        ("dfd.p=often", r"dfd\.p: Value 'often' of type 'str' could not be converted to Float"),
        ("dfd.granularity=batch", r"dfd\.granularity: Invalid value 'batch', expected one of"),
        ("dfd.p=2", r"dfd\.p is 2\.0; it must be at least 0 and at most 1"),
        ("dfd.input_range=[0.9,0.1]", r"dfd\.input_range is \[0\.9, 0\.1\]; the first must be"),
        ("dfd.sigma_range=[0.9,0.1]", r"dfd\.sigma_range is \[0\.9, 0\.1\]; the first must be"),
        (
            "rollout.frames=10",
            r"rollout\.frames is 10 latent frames, but a chunk has 3 .* use 9 or 12",
        ),
        ("rollout.window=2", r"rollout\.window is 2 latent frames, .* use 3 or 6"),
        ("rollout.window=8", r"rollout\.window is 8 .* use 6 or 9"),
        ("rollout.sink=1", r"rollout\.sink is 1 .* use 0 or 3"),
        ("rollout.ladder=[900,500]", r"must start at 1000"),
        (
            "batch.micro=5",
            r"batch\.size \(16\) is not a multiple of batch\.micro \(5\); use 15 or 20",
        ),
        ("score.sigma_max=0.01", r"score\.sigma_min is 0\.02 .* the first must be smaller"),
        ("score.fake_per_student=0", r"at least 1"),
        ("network.head_dim=5", r"network\.head_dim is 5; it must be at least 6"),
        ("network.head_dim=7", r"network\.head_dim is 7; .* even number"),
        ("run.stage=gan", r"run\.stage is 'gan'; use one of causal, decoder, dfd, dmd, dp_dmd, "),
        ("weights.teacher=", r"weights\.teacher is empty"),
        ("score.guidance=1" + "0" * 400, r"minimal\.yaml: int too large"),
        ("data.video_size={}", r"minimal\.yaml: .*a list and a section cannot replace"),
        ("arms=${run.seed}", r"arms is 0; it must be a section that holds settings by name"),
        ("gan=${run.seed}", r"gan is 0; it must be a section that holds settings by name"),
        ("run=${score.sigma_min}", r"run is 0\.02; it must be a section"),
        ("run.gpus=0", r"run\.gpus is 0; it must be at least 1"),
        ("run.stage=pairs", r"pairs\.out is empty"),
        ("pairs.steps=0", r"pairs\.steps is 0"),
        ("model.compute=float16", r"model\.compute: Invalid value 'float16', expected one of"),
        ("data.shards=", r"data\.shards is empty"),
        ("seed", r"'seed' is not of the form section\.setting=value"),
        ("log.wandb=yes", r"log\.wandb: Key 'wandb' not in"),
    ],
)
def test_mistake_is_explained(minimal: str, override: str, message: str) -> None:
    """Catches a message without its file, full path, the value got or what to write."""
    with pytest.raises(ConfigError, match=message) as error:
        load_config(minimal, [override])
    assert "minimal.yaml" in str(error.value)


def test_unknown_file_lists_the_known() -> None:
    """Catches a typo in --config that is refused without the names that exist.

    Settings of streams are no configs of training.
    """
    with pytest.raises(ConfigError, match=r"no config file nowhere\.yaml.*dfd_ar\.yaml") as error:
        load_config("nowhere.yaml")
    assert "stream/" not in str(error.value)


def test_settings_are_frozen(minimal: str) -> None:
    """Catches a setting changed during a run, which the saved config would not hold."""
    with pytest.raises(AttributeError):
        load_config(minimal).run.seed = 3  # type: ignore[misc]


def test_change_keeps_the_rest(minimal: str) -> None:
    """Catches an arm that differs from its comparison in more than it names."""
    config = load_config(minimal)
    before, after = as_dict(config), as_dict(change(config, ["run.name=arm"]))
    assert before.pop("run") | {"name": "arm"} == after.pop("run")
    assert before == after


def test_assets_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches shipped weights that are only found from one working directory."""
    monkeypatch.chdir(tmp_path)
    assert find_file("assets/tiny/codec.safetensors").is_file()
    assert find_file("mine.safetensors") == Path("mine.safetensors")


NUMBERS = [
    (name, setting.name)
    for name, section in SECTIONS.items()
    for setting in dataclasses.fields(section)
    if get_type_hints(section)[setting.name] in (int, float, tuple[int, int], tuple[float, float])
]


@pytest.mark.parametrize(("section", "setting"), NUMBERS)
def test_every_number_has_a_range(minimal: str, section: str, setting: str) -> None:
    """Catches a setting that takes zero, a negative number or NaN without a word."""
    field = next(f for f in dataclasses.fields(SECTIONS[section]) if f.name == setting)
    low, high, above = field.metadata["range"]
    outside = [low if above else low - 1, high + 1, "nan", "inf", "-inf"]
    is_whole = get_type_hints(SECTIONS[section])[setting] in (int, tuple[int, int])
    many = isinstance(field.default, tuple)
    for value in outside[:2] if is_whole else outside:
        number = int(value) if is_whole else value
        override = f"[{number},{number}]" if many else number
        with pytest.raises(ConfigError, match=rf"{section}\.{setting}.* must be .* at most"):
            load_config(minimal, [f"{section}.{setting}={override}"])


@pytest.mark.parametrize("text", ["- run\n", "base: broken.yaml\n"], ids=["list", "its own base"])
def test_a_broken_file_is_one_sentence(tmp_path: Path, text: str) -> None:
    """Catches a file without sections, and a `base` that leads back to itself."""
    (tmp_path / "broken.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"broken\.yaml: ") as error:
        load_config(str(tmp_path / "broken.yaml"))
    assert "\n" not in str(error.value)


def test_recipes_state_the_published_settings() -> None:
    """Catches a base file that overwrites a published setting.

    research/selfforcing.md 8.1 lists them; merged recipes are read.
    """
    dmd, dfd = load_config("wan1.3b/dmd_ar.yaml"), load_config("wan1.3b/dfd_ar.yaml")
    for config in (dmd, dfd):
        score, student, fake = config.of(ScoreConfig), config.optim.student, config.optim.fake
        assert (score.guidance, score.shift, score.sigma_min, score.sigma_max) == (
            4.0,
            5.0,
            0.02,
            0.98,
        )
        assert (config.rollout.frames, config.rollout.chunk_frames, config.rollout.shift) == (
            21,
            3,
            5.0,
        )
        assert tuple(config.rollout.ladder) == (1000, 750, 500, 250)
        assert (student.lr, fake.lr, score.fake_per_student) == (2e-6, 4e-7, 5)
        assert tuple(student.betas) == tuple(fake.betas) == (0.0, 0.999)
        assert (student.weight_decay, student.clip, config.batch.size, config.ema.decay) == (
            0.01,
            10.0,
            64,
            0.99,
        )
    # iterations there, student updates here
    assert (dmd.run.student_updates, dmd.ema.start) == (600 // 5, 200 // 5)
    assert (dfd.run.student_updates, dfd.of(DFDConfig).p) == (160 // 5, 0.5)


def test_saved_settings_need_no_base(tmp_path):
    """Catches a run's config.yaml that can only be read beside its base configs."""
    config = load_config("wan1.3b/dfd_ar.yaml", ["run.seed=5"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert as_dict(load_config(str(tmp_path / "config.yaml"))) == as_dict(config) | {"base": ""}


@pytest.mark.parametrize("name", training_configs())
def test_a_recipe_sets_nothing_that_its_stage_does_not_read(name: str) -> None:
    """Catches a recipe of an ODE init that trains by teacher forcing, since its stage is another's.

    What a recipe says itself must reach the stage of one of its runs. A preset's name is read
    before there is a stage.
    """
    own = OmegaConf.to_container(OmegaConf.load(training_configs()[name]))
    assert isinstance(own, dict)
    if own.get("dfd", {}).keys() == {"preset"}:
        del own["dfd"]
    config = load_config(name)
    read = {section for run in arms_of(config) for section in stage_of(run).sections}
    of_stages = {section for stage in STAGES.values() for section in stage.sections}
    assert (own.keys() & of_stages) - read == set()
