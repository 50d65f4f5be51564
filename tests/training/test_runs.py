"""Whole runs of `train.py` at tiny size: resume, interruption, kills and bad input."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Script, run_script
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import fill_weights, save_network

from selfforcing_dfd.cli.train import run
from selfforcing_dfd.common import UserError, shipped
from selfforcing_dfd.config import Config, ConfigError
from selfforcing_dfd.data.shards import ShardReader
from selfforcing_dfd.evaluation.scores import SCORES, note_scores, read_scores
from selfforcing_dfd.training.build import build_network, build_trainer
from selfforcing_dfd.training.finite import NonFiniteError
from selfforcing_dfd.training.folders import run_folder
from selfforcing_dfd.training.loop import Interrupted, Trainer
from selfforcing_dfd.training.tracking import read_metrics
from selfforcing_dfd.weights.checkpoint_files import CheckpointError
from tests.training.conftest import MODEL, arguments, finished_run

Settings = Callable[..., Config]

STAGES = {
    "teacher": ["run.stage=teacher", "optim.student.kind=muon", "weights.teacher=''"],
    "init": ["run.stage=init"],
    "dmd": ["run.stage=dmd"],
    "dfd": [
        "dfd.pairing=noised_real",
        "score.regression_per_student=2",
        "regression.target=clip",
        "dfd.ramp_updates=2",
        "dfd.p_start=0",
    ],
    "causal": ["run.stage=causal"],
    "regression": ["run.stage=regression", "regression.target=clip"],
    "inversion": ["dfd.pairing=inversion", "dfd.p=1"],
    "bfloat16": ["model.compute=bfloat16", "model.activation_checkpointing=full", "run.stage=dmd"],
    "gan": ["run.stage=dmd", "gan.weight=0.3", "gan.inner=8", "gan.depths=[1.0]"],
    "decoder": ["run.stage=decoder", "decoder.widths=[8,8,8]", "decoder.depths=[1,1,1]"],
    "decoder bfloat16": [
        "run.stage=decoder",
        "model.compute=bfloat16",
        "decoder.widths=[8,8,8]",
        "decoder.depths=[1,1,1]",
        "decoder.crop=4",
    ],
}


def everything(trainer: Trainer) -> dict[str, Any]:
    """All that a run holds, by dotted name: networks, optimizers, EMA, clock."""
    found: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        value = value.state_dict() if hasattr(value, "state_dict") else value
        if isinstance(value, dict):
            for name, child in value.items():
                walk(f"{prefix}.{name}", child)
        else:
            found[prefix] = value.clone() if isinstance(value, torch.Tensor) else value

    walk("", trainer.state())
    return found


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first.keys() == second.keys()
    differing = [
        name
        for name in first
        if not torch.equal(torch.as_tensor(first[name]), torch.as_tensor(second[name]))
    ]
    assert not differing


@pytest.mark.parametrize("stage", STAGES)
def test_resume_is_bit_exact(settings: Settings, stage: str) -> None:
    """Catches any state that a resume forgets: 1 + 2 updates must equal 3, bit for bit."""
    short = (*STAGES[stage], "run.student_updates=3")
    whole = build_trainer(settings(*short, "run.name=whole"))
    whole.run()
    build_trainer(settings(*short, "run.name=parts", "run.student_updates=1")).run()
    parts = build_trainer(settings(*short, "run.name=parts"), resume=True)
    assert parts.clock.student_updates == 1
    parts.run()
    assert_same(everything(whole), everything(parts))


def test_interruption_inside_a_cycle_is_bit_exact(settings: Settings) -> None:
    """Catches a run stopped between two fake-score updates that goes on with a new cycle."""
    whole = build_trainer(settings("run.name=whole"))
    whole.run()
    parts = build_trainer(settings("run.name=parts"))
    parts.stop_requested = True
    with pytest.raises(Interrupted, match=r"saved at student update 0 of 4.*--resume"):
        parts.run()
    again = build_trainer(settings("run.name=parts"), resume=True)
    assert (again.clock.fake_updates, again.clock.student_updates) == (1, 0)
    again.run()
    assert_same(everything(whole), everything(again))


def test_accumulation_changes_nothing_but_rounding(settings: Settings) -> None:
    """Catches a mean of means, or a draw used twice, where four samples take two passes."""
    whole = build_trainer(
        settings("run.name=whole", "dfd.granularity=sample", "run.student_updates=1")
    )
    parts = build_trainer(
        settings(
            "run.name=parts", "dfd.granularity=sample", "run.student_updates=1", "batch.micro=2"
        )
    )
    whole.run()
    parts.run()
    first = everything(whole)
    second = everything(parts)
    for name in (
        n for n in first if n.startswith((".student_adamw", ".fake_adamw")) and "exp_avg_sq" in n
    ):
        # float32 sums in another order: gradients agree to about 1e-5 of their size, their squares
        # to twice that
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-12)


def start(world: Path, out: Path, *overrides: str) -> Script:
    """`python train.py` as its own process."""
    (out / "killed.yaml").write_text("run: {stage: dfd, name: killed}\n")
    settings = ["--config", str(out / "killed.yaml"), *arguments(world, out), *overrides]
    return Script(out, "train.py", *settings)


def wait_for_lines(path: Path, process: Script, lines: int, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not (path.exists() and path.read_text().count("\n") >= lines):
        assert process.runs, process.end()
        assert time.monotonic() < deadline, f"{path} has not {lines} lines after {timeout_s} s"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was left in peace."""
    config = finished_run(tmp_path_factory.mktemp("whole"), world, "checkpoint.every=1")
    return run_folder(config)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_killed_run_goes_on(world: Path, whole: Path, tmp_path: Path, how: signal.Signals) -> None:
    """Catches a run that ends in any way and then reaches other bits than one left in peace."""
    process = start(world, tmp_path, "checkpoint.every=1")
    killed = tmp_path / "runs" / "killed"
    wait_for_lines(killed / "metrics.jsonl", process, lines=5)
    process.send_signal(how)
    end = process.end()
    if how is signal.SIGKILL:
        assert end.code == -how
    else:
        assert end.code == 130
        assert "go on with the same command and --resume" in end.errors
    resumed = start(world, tmp_path, "checkpoint.every=1", "--resume").end()
    assert resumed.code == 0, resumed
    for name in ("student.safetensors", "fake.safetensors"):
        assert_same(load_file(whole / name), load_file(killed / name))
    lines = read_metrics(killed / "metrics.jsonl")
    assert [line["student_update"] for line in lines if line["kind"] == "student"] == [1, 2, 3, 4]


def test_not_finite_stops_before_the_step(settings: Settings, world: Path, tmp_path: Path) -> None:
    """Catches a NaN in weights or checkpoints; `nan_to_num` in the public code hides it."""
    trainer = build_trainer(settings("run.stage=teacher"))
    trainer.run()
    network = trainer.learners["student"].network
    with torch.no_grad():
        network.get_parameter("proj_out.bias")[0] = float("nan")
    before = everything(trainer)
    trainer.student_updates += 1
    with pytest.raises(NonFiniteError, match=r"loss is nan at student update .* samples from 16"):
        trainer.run()
    for name, value in everything(trainer).items():
        if isinstance(value, torch.Tensor) and "proj_out.bias" not in name:
            assert torch.equal(value, before[name])


def test_resume_refuses_other_settings(settings: Settings) -> None:
    """Catches a resume with another learning rate, and one that refuses more updates."""
    build_trainer(settings("run.student_updates=2")).run()
    with pytest.raises(CheckpointError, match=r"optim\.student\.lr: checkpoint 0\.001, now 0\.002"):
        build_trainer(settings("optim.student.lr=2e-3"), resume=True)
    build_trainer(settings("run.student_updates=3"), resume=True).run()


def test_resume_refuses_another_teacher(settings: Settings, world: Path, tmp_path: Path) -> None:
    """Catches a resume against another teacher, which is not in the checkpoint."""
    build_trainer(settings("run.student_updates=1")).run()
    teacher = world / "teacher.safetensors"
    original = teacher.read_bytes()
    try:
        other = build_network(MODEL)
        fill_weights(other, seed=9)
        save_network(teacher, other)
        with pytest.raises(CheckpointError, match=r"teacher \(fingerprint\): checkpoint"):
            build_trainer(settings(), resume=True)
    finally:
        teacher.write_bytes(original)


def test_used_folder_is_refused(settings: Settings) -> None:
    """Catches a second run into a folder, which would mix metrics and checkpoints."""
    run(settings("run.student_updates=1"))
    with pytest.raises(ValueError, match=r"resume that run, or give this one another folder"):
        run(settings("run.student_updates=1"))
    # finished: nothing to do, and nothing changed
    run(settings("run.student_updates=1"), resume=True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "weights.teacher=nowhere.safetensors",
            r"weights\.teacher is nowhere\.safetensors, which does not exist",
        ),
        ("run.device=cuda:7", r"run\.device is cuda:7 but torch sees \d+ GPUs"),
        ("run.device=abacus", r"run\.device is 'abacus'; use auto, cpu, cuda or cuda:N"),
        ("rollout.frames=6", r"holds latents \(9, 16, 8, 8\).*rollout\.frames is 6"),
        ("weights.teacher=pyproject.toml", r"pyproject\.toml"),
    ],
)
def test_bad_start_is_explained(settings: Settings, override: str, message: str) -> None:
    """Catches a mistake that is found after hours, or without the setting to change."""
    config = settings(override)
    with pytest.raises(UserError, match=message):
        run(config)
    assert not (run_folder(config) / "checkpoints").exists()


def test_inversion_needs_noise(settings: Settings, world: Path, tmp_path: Path) -> None:
    """Catches inversion without stored noise, which would silently be caption pairing."""
    from selfforcing_dfd.data.sources.tiny import make_tiny_shards

    make_tiny_shards(tmp_path / "bare", 4, 0, "short", 9, shipped("assets/tiny/codec.safetensors"))
    with pytest.raises(ConfigError, match=r"dfd\.pairing is inversion, but .* holds no noise"):
        run(settings("dfd.pairing=inversion", f"data.shards={tmp_path / 'bare'}"))


def test_an_interrupted_start_finds_the_missing_noise(settings: Settings, tmp_path: Path) -> None:
    """Catches a demo that was stopped between clips and noise and does not go on."""
    from selfforcing_dfd.data.sources.tiny import make_tiny_shards

    shards = tmp_path / "begun"
    make_tiny_shards(shards, 24, 0, "short", 9, shipped("assets/tiny/codec.safetensors"))
    short = ["run.student_updates=1", "score.fake_per_student=1"]
    tiny = ["data.tiny.clips=24", "data.tiny.noise_steps=1", f"data.shards={shards}"]
    run(settings("dfd.pairing=prefix", *tiny, *short))
    assert ShardReader(shards).has_noise


def test_metrics_are_split(settings: Settings) -> None:
    """Catches merged numbers, which cannot tell whether DFD or DMD moved."""
    config = settings(
        "dfd.granularity=sample", "batch.size=8", "batch.micro=4", "run.student_updates=3"
    )
    run(config)
    lines = [
        line
        for line in read_metrics(run_folder(config) / "metrics.jsonl")
        if line["kind"] == "student"
    ]
    names = set().union(*lines)
    for wanted in (
        "discrepancy/dfd",
        "discrepancy/dmd",
        "normaliser/dfd",
        "gap",
        "grad_norm",
        "saturation_ratio",
    ):
        assert wanted in names, sorted(names)
    assert any(name.startswith("discrepancy/sigma<=") for name in names)


def test_guards_see_all_micro_batches(settings: Settings) -> None:
    """Catches guards that compare one clip with one clip where micro is 1, without spread."""
    rows = {}
    for micro in (1, 4):
        config = settings(f"run.name=micro{micro}", f"batch.micro={micro}", "run.student_updates=1")
        run(config)
        lines = read_metrics(run_folder(config) / "metrics.jsonl")
        rows[micro] = next(line for line in lines if line["kind"] == "student")
    assert rows[1]["spread"] > 0
    for name in ("saturation", "contrast", "sharpness", "motion", "spread", "spread_ratio"):
        # the clips are the same up to float32 rounding in another batch size
        assert rows[1][name] == pytest.approx(rows[4][name], rel=1e-3), name


def test_pictures_come_with_checkpoints(settings: Settings) -> None:
    """Catches a tracker without pictures, pictures at every update, and one that moves numbers.

    Samples of fixed clips come from the same checkpoints and move no number either.
    """
    config = settings(
        "log.trackers=[tensorboard]",
        "run.name=seen",
        "run.student_updates=3",
        "report.every=2",
        "report.every_clips=2",
        "rollout.ladder=[1000]",
    )
    run(config)
    events = EventAccumulator(str(run_folder(config) / "tensorboard"))
    events.Reload()
    assert [picture.step for picture in events.Images("samples")] == [2, 3]
    assert [picture.step for picture in events.Images("fixed_samples")] == [2]
    (line,) = read_scores(run_folder(config) / SCORES)
    assert line["student_update"] == 2
    (curve,) = events.Scalars("fixed_samples/contrast")
    assert curve.value == pytest.approx(line["scores"]["contrast"])
    assert (run_folder(config) / "samples/000002.mp4").stat().st_size
    note_scores(run_folder(config) / SCORES, 1, {"contrast": float("nan")})
    (line,) = read_scores(run_folder(config) / SCORES)
    assert line == {"student_update": 1, "scores": {"contrast": None}}
    plain = settings("run.name=plain", "run.student_updates=3", "rollout.ladder=[1000]")
    run(plain)
    lines = [
        [
            {**line, "seconds": 0, "core_seconds": 0}
            for line in read_metrics(run_folder(each) / "metrics.jsonl")
        ]
        for each in (config, plain)
    ]
    assert lines[0] == lines[1]
    with pytest.raises(ConfigError, match=r"report.every is 3 and checkpoint.every 2"):
        run(settings("run.name=odd", "report.every=3"))


def test_cli_says_what_is_wrong(tmp_path: Path) -> None:
    """Catches a traceback for a mistake, or what packages say at their import, in its place.

    Also another exit code than 2, and a --dry-run that trains.
    """
    command = [sys.executable, "train.py", "--config", "dfd_ar.yaml"]
    wrong = subprocess.run(
        [*command, "dfd.pp=1"], cwd=shipped("."), capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 2
    assert "Did you mean: 'p'" in wrong.stderr
    assert len(wrong.stderr.splitlines()) == 1
    options = ["--config", "dfd_ar.yaml", "--dry-run", f"run.out={tmp_path / 'runs'}"]
    dry = run_script(tmp_path, "train.py", *options)
    assert dry.code == 0, dry.errors
    assert "student 1,580,736" in dry.printed
    assert not (tmp_path / "runs").exists()
