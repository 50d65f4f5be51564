"""Faults of disks and data around one run: named, and afterwards as if they had never been."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from selfforcing_dfd.cli.train import run
from selfforcing_dfd.config import Config
from selfforcing_dfd.data.shards import ShardError
from selfforcing_dfd.training.build import build_trainer
from selfforcing_dfd.training.folders import run_folder
from selfforcing_dfd.training.tracking import read_metrics
from tests.training.conftest import finished_run

Settings = Callable[..., Config]
FEW = ("run.stage=dmd", "score.fake_per_student=1", "run.student_updates=4", "checkpoint.every=1")
RESULTS = ("student.safetensors", "fake.safetensors")


@pytest.fixture(scope="module")
def unharmed(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing happened to."""
    return run_folder(finished_run(tmp_path_factory.mktemp("unharmed"), world, *FEW))


def assert_as_unharmed(folder: Path, unharmed: Path) -> None:
    """The same weights, bit for bit, and the same lines of metrics."""
    for name in RESULTS:
        assert (folder / name).read_bytes() == (unharmed / name).read_bytes()
    assert metrics_of(folder) == metrics_of(unharmed)


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run, without what no two runs have alike."""
    lines = read_metrics(folder / "metrics.jsonl")
    return [{**line, "seconds": 0, "core_seconds": 0} for line in lines]


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def flip_newest(folder: Path) -> None:
    newest = folder / "checkpoints" / "student_update=000002"
    flip(min(newest.glob("*.safetensors")), -5)


def change_clock(folder: Path) -> None:
    """More samples than were seen, in a file that is valid JSON as before."""
    path = folder / "checkpoints" / "student_update=000002" / "meta.json"
    text = path.read_text()
    assert '"clock.samples": 16' in text
    path.write_text(text.replace('"clock.samples": 16', '"clock.samples": 24'))


def cut_metrics(folder: Path) -> None:
    """What a power cut leaves of a file's last block."""
    path = folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20] + bytes(512))


@pytest.mark.parametrize("harm", [flip_newest, change_clock, cut_metrics])
def test_a_harmed_run_folder_goes_on_to_the_same_end(
    settings: Settings, unharmed: Path, harm: Callable[[Path], None]
) -> None:
    """Catches a resume to other weights without a word, and one that cannot go on unattended."""
    run(settings(*FEW, "run.student_updates=2"))
    harm(run_folder(settings()))
    run(settings(*FEW), resume=True)
    folder = run_folder(settings())
    if harm is cut_metrics:  # one line is lost for good, as it was cut
        lines = len(read_metrics(folder / "metrics.jsonl"))
        assert lines == len(read_metrics(unharmed / "metrics.jsonl")) - 1
        shutil.copyfile(unharmed / "metrics.jsonl", folder / "metrics.jsonl")
    assert_as_unharmed(folder, unharmed)


@pytest.mark.parametrize("how", ["flipped", "cut", "deleted"])
def test_a_harmed_shard_stops_the_run_until_it_is_whole(
    settings: Settings, world: Path, tmp_path: Path, unharmed: Path, how: str
) -> None:
    """Catches a copy error that changes the data in silence: other samples would take its place."""
    config = settings(*FEW, f"data.shards={tmp_path / 'shards'}")
    shutil.copytree(world / "shards", tmp_path / "shards")
    run(settings(*FEW, f"data.shards={tmp_path / 'shards'}", "run.student_updates=1"))
    trainer = build_trainer(config, resume=True)
    trainer.tracker.close()
    entry = trainer.reader.index.samples[trainer.order.sample_at(trainer.clock.samples + 5)]
    shard = tmp_path / "shards" / entry.shard
    whole = shard.read_bytes()
    if how == "flipped":
        member = entry.members["latent.npy"]
        flip(shard, member.offset + member.size - 1)
    elif how == "cut":
        shard.write_bytes(whole[:-512])
    else:
        shard.unlink()
    with pytest.raises(ShardError, match=f"{entry.shard}.*Copy the folder again"):
        run(config, resume=True)
    shard.write_bytes(whole)
    run(config, resume=True)
    assert_as_unharmed(run_folder(config), unharmed)
