"""`--dry-run`: every shipped config plans without its files and names the missing ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny_models import save_network

from selfforcing_dfd.common import shipped
from selfforcing_dfd.config import Config, NetworkConfig
from selfforcing_dfd.data.sources.tiny import make_tiny_shards
from selfforcing_dfd.stages import load_config
from selfforcing_dfd.stages.config_files import training_configs
from selfforcing_dfd.training.build import build_network
from selfforcing_dfd.training.plan import plan

CONFIGS = sorted(training_configs())


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory: none of the files that recipes name are there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def table(config: Config) -> str:
    text, settings = plan(config).split("\nsettings other than the defaults\n")
    assert "run:" in settings
    return text


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_config_plans_without_its_files(name: str) -> None:
    """Catches a plan that needs missing weights, and a recipe that no command leads to.

    Also a command that names a recipe which was renamed, and rows of "under 0.1" GPU-hours for the
    tiny world.
    """
    text = table(load_config(name))
    for part in ("parameters", "memory", "operations", "in all"):
        assert part in text
    is_large = name.startswith("wan")
    assert ("GPU-hours" in text) == is_large
    assert is_large or ("time here" in text and "H100-hours" not in text)
    assert "no shipped config makes it" not in text
    for line, following in zip(text.split("\n"), text.split("\n")[1:], strict=False):
        if line.endswith("(MISSING)"):
            assert following.strip().startswith(("hf download ", "selfforcing-dfd "))
    named = re.findall(r"^ *selfforcing-dfd train (?:.* )?--config (\S+)", text, re.M)
    assert [recipe for recipe in named if not (shipped("configs") / recipe).is_file()] == []


def test_commands_for_weights_and_data() -> None:
    """Catches a folder or repository that is not where the config looks."""
    text = table(
        load_config(
            "wan1.3b/dmd_ar.yaml", ["weights.student=weights/Self-Forcing/checkpoints/ode_init.pt"]
        )
    )
    assert (
        "hf download Wan-AI/Wan2.1-T2V-14B-Diffusers --local-dir weights/Wan2.1-T2V-14B-Diffusers"
        in text
    )
    assert (
        "hf download gdhe17/Self-Forcing checkpoints/ode_init.pt --local-dir weights/Self-Forcing"
        in text
    )
    assert (
        "pack CLIPS --codec wan --model weights/Wan2.1-T2V-1.3B-Diffusers --frames 81 "
        "--size 480x832" in text
    )
    text = table(load_config("wan1.3b/dfd_ar.yaml"))
    assert (
        "selfforcing-dfd import data/vipe_long_lmdb --model weights/Wan2.1-T2V-1.3B-Diffusers "
        "--out data/wan-480p" in text
    )
    assert "selfforcing-dfd train --config wan1.3b/ode_pairs.yaml" in table(
        load_config("wan1.3b/init_ode.yaml")
    )
    assert "selfforcing-dfd train --config wan1.3b/dmd_ar_dfd.yaml" in table(
        load_config("wan1.3b/dfd_ar.yaml")
    )


def test_unknown_weights_are_said_to_be_unknown() -> None:
    """Catches an invented download for a file of the user's own."""
    assert "no shipped config makes it; correct the path" in table(
        load_config("dfd_ar.yaml", ["weights.student=mine.safetensors"])
    )


def test_entries_of_a_file_are_shown() -> None:
    """Catches a dry run that hides which model of a checkpoint it would read."""
    overrides = ["weights.fake=weights/Self-Forcing/model.pt", "weights.fake_entry=critic"]
    assert "fake: weights/Self-Forcing/model.pt [critic] (MISSING)" in table(
        load_config("wan1.3b/dfd_ar.yaml", overrides)
    )


def memory_in_all(text: str) -> float:
    return next(
        float(line.split()[0].replace(",", ""))
        for line in text.split("\n")
        if line.endswith("GB  in all")
    )


def test_gpus_share_the_memory() -> None:
    """Catches --gpus that changes the words only."""
    one, eight = (
        memory_in_all(table(load_config("wan1.3b/dfd_ar.yaml", [f"run.gpus={n}"]))) for n in (1, 8)
    )
    assert one == pytest.approx(65, abs=1)
    assert eight < one / 2


def test_gpus_share_the_hours() -> None:
    """Catches hours of one GPU that are told for several, and an MFU that counts work twice."""
    text = table(load_config("wan1.3b/dfd_ar.yaml", ["run.gpus=8"]))
    found = re.search(r"([\d.]+) h  H100, ([\d.]+) h on 8 of them", text)
    assert found is not None
    assert float(found[2]) == pytest.approx(float(found[1]) / 8, abs=0.1)
    assert "64 samples each in 8 passes of each of 8 GPUs" in text
    assert "24% of the bf16 peak" in text and "MFU is 21%" in text


def test_shards_that_are_there_are_measured_not_assumed(nowhere: Path) -> None:
    """Catches the default size of clips, or of text, taken for that of the given data."""
    make_tiny_shards(
        nowhere / "data" / "tiny-dfd", 4, 0, "short", 9, shipped("assets/tiny/codec.safetensors")
    )
    text = table(load_config("dfd_ar.yaml", ["data.video_size=[480,832]"]))
    assert "[16, 9, 16, 8, 8] in 3 chunks of 3 latent frames; text [12, 32]" in text
    assert "data/tiny-dfd, 4 samples" in text
    assert "no caption  zeros" in text


def test_missing_noise_is_named_with_its_command(nowhere: Path) -> None:
    """Catches missing noise that is noticed only after the weights are loaded."""
    make_tiny_shards(nowhere / "shards", 4, 0, "short", 9, shipped("assets/tiny/codec.safetensors"))
    config = load_config(
        "tiny/dmd.yaml", ["run.stage=dfd", "dfd.pairing=prefix", "data.shards=shards"]
    )
    assert "selfforcing-dfd invert shards" in table(config)
    assert "invert shards" not in table(load_config("tiny/dmd.yaml", ["data.shards=shards"]))


def test_planning_reads_sizes_and_no_tensors(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches 57 GB read to count 14B parameters: a weights file's header tells its sizes."""
    network = build_network(NetworkConfig(num_heads=2, head_dim=8, num_layers=1, ffn_dim=32))
    save_network(nowhere / "mine.safetensors", network)
    monkeypatch.setattr("selfforcing_dfd.training.build.load_network", None)
    text = table(load_config("dfd_ar.yaml", ["weights.teacher=mine.safetensors"]))
    count = sum(parameter.numel() for parameter in network.parameters())
    assert f"teacher {count:,}" in text
    assert "teacher 14,288,491,584" in table(load_config("wan1.3b/dmd_ar.yaml"))


def test_sum_over_the_recipes_that_come_before() -> None:
    """Catches 27 hours for a student that takes 440 hours from the beginning."""
    text = table(load_config("wan1.3b/dfd_ar.yaml"))
    total = re.search(r"with the recipes that it starts from: ([\d.,]+) H100-hours", text)
    assert total is not None
    parts = re.findall(r"([\d.]+) h  (wan1\.3b/\S+)", text)
    assert [name for _, name in parts] == [
        "wan1.3b/ode_pairs.yaml",
        "wan1.3b/init_ode.yaml",
        "wan1.3b/dmd_ar_dfd.yaml",
        "wan1.3b/init_tf.yaml",  # of one arm alone
        "wan1.3b/dfd_ar",
    ]
    assert float(total[1]) == pytest.approx(sum(float(hours) for hours, _ in parts), abs=0.3)


def test_unknown_sizes_are_said_to_be_unknown() -> None:
    """Catches a cost of invented sizes for weights that are missing."""
    text = table(load_config("dfd_ar.yaml", ["weights.student=mine.safetensors"]))
    assert "student unknown until it is there" in text
    assert "cost        unknown until the weights are there" in text
