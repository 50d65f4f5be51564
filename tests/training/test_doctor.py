"""The doctor finds what is wrong with a run's folder, and mends it without losing anything."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from selfforcing_dfd.cli.main import main
from selfforcing_dfd.cli.train import run
from selfforcing_dfd.common import EXIT_USER_ERROR, sealed
from selfforcing_dfd.config import Config
from selfforcing_dfd.training.doctor import examine
from selfforcing_dfd.training.exclusive import lock_folders
from selfforcing_dfd.training.folders import run_folder
from selfforcing_dfd.training.tracking import read_metrics
from selfforcing_dfd.weights.checkpoint_files import describe_files
from selfforcing_dfd.weights.run_record import describe_result, read_record, write_record
from tests.training.conftest import finished_run

FEW = ("run.stage=dmd", "score.fake_per_student=1", "run.student_updates=3", "checkpoint.every=1")
TENSORS = "shard-00001-model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished run of three updates."""
    return finished_run(tmp_path_factory.mktemp("healthy"), world, *FEW)


@pytest.fixture
def folder(finished: Config) -> Iterator[Path]:
    """Its folder, put back afterwards."""
    own = run_folder(finished)
    kept = own.with_name("kept")
    shutil.copytree(own, kept)
    yield own
    shutil.rmtree(own)
    kept.rename(own)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def flip_checkpoint(run: Path) -> None:
    flip(run / "checkpoints" / "student_update=000003" / TENSORS)


def spoil_checkpoint(run: Path) -> None:
    """NaN in the average, with hashes that fit."""
    checkpoint = run / "checkpoints" / "student_update=000003"
    tensors = load_file(checkpoint / TENSORS)
    next(tensor for name, tensor in tensors.items() if name.startswith("ema.")).fill_(torch.nan)
    save_file(tensors, checkpoint / TENSORS)
    meta = json.loads((checkpoint / "meta.json").read_text())
    meta["files"] = describe_files([checkpoint / TENSORS])
    (checkpoint / "meta.json").write_text(json.dumps(sealed(meta)))


def bring_other_checkpoint(run: Path) -> None:
    """A whole checkpoint of a run with another seed."""
    checkpoint = run / "checkpoints" / "student_update=000003"
    meta = json.loads((checkpoint / "meta.json").read_text())
    meta["config_yaml"] = meta["config_yaml"].replace("seed: 0", "seed: 7")
    (checkpoint / "meta.json").write_text(json.dumps(sealed(meta)))


def leave_partials(run: Path) -> None:
    (run / ".tmp-12-student.safetensors").write_bytes(b"half")
    (run / "checkpoints" / ".tmp-student_update=000004").mkdir()
    (run / "checkpoints" / ".old-student_update=000003").mkdir()


def lose_replaced(run: Path) -> None:
    newest = run / "checkpoints" / "student_update=000003"
    newest.rename(newest.with_name(".old-student_update=000003"))


def write_nuls(run: Path) -> None:
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + bytes(100) + b"\n" + lines[-1] + b"\xff\xfe\n")


def double_lines(run: Path) -> None:
    path = run / "metrics.jsonl"
    path.write_text(path.read_text() + path.read_text().splitlines(keepends=True)[-1])


def edit_config(run: Path) -> None:
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("seed: 0", "seed: 9"))


def edit_record(run: Path) -> None:
    path = run / "run.json"
    path.write_text(path.read_text().replace('"student_updates": 3', '"student_updates": 9'))


MENDABLE: dict[Callable[[Path], None], str] = {
    flip_checkpoint: r"000003 cannot be used: shard-00001.* \(SHA-256 differs\)",
    spoil_checkpoint: "000003 cannot be used: .* not finite, first in ema.shadow",
    bring_other_checkpoint: "000003 was made with other settings than the run has",
    leave_partials: ".tmp-student_update=000004 is left over from a write that was killed",
    lose_replaced: ".old-student_update=000003 is left over from a replacement",
    write_nuls: "metrics.jsonl: 2 lines cannot be read",
    double_lines: "metrics.jsonl: 1 turns are there twice",
    edit_config: "config.yaml is not what the run was trained with",
    edit_record: "run.json cannot be believed",
}


@pytest.mark.parametrize("harm", MENDABLE)
def test_it_is_named_and_mended(
    folder: Path, finished: Config, capsys: pytest.CaptureFixture[str], harm: Callable[[Path], None]
) -> None:
    """Catches a harm that nobody sees, one that stays, and a cure that changes or loses results."""
    student = (folder / "student.safetensors").read_bytes()
    harm(folder)
    before = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    assert main(["doctor", str(folder)]) == EXIT_USER_ERROR
    printed = capsys.readouterr()
    found = [line for line in printed.out.splitlines() if "WRONG" in line]
    assert len(found) == int(printed.err.split()[1])
    assert any(re.search(MENDABLE[harm], line) for line in found), printed.out
    assert "to mend: " in printed.out
    after = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    assert after == before

    assert main(["doctor", str(folder), "--mend"]) == 0
    again = examine(folder)
    needs_resume = [finding for finding in again if "there is no run.json" in finding.problem]
    assert again == needs_resume
    run(finished, resume=True)
    assert examine(folder) == []
    assert (folder / "student.safetensors").read_bytes() == student
    lines = read_metrics(folder / "metrics.jsonl")
    keys = [(line["kind"], line["count"]) for line in lines]
    assert len(set(keys)) == len(keys) >= 5


def test_a_healthy_run_is_left_alone(
    folder: Path, finished: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches false alarms, and a doctor that mends what is whole."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert main(["doctor", str(folder), "--mend"]) == 0
    printed = capsys.readouterr().out
    assert "finished; 3 student updates asked for" in printed
    assert "3 checkpoints, the newest student_update=000003" in printed
    assert printed.endswith("nothing is wrong\n")
    assert main(["verify", str(folder)]) == 0
    assert "as written" in capsys.readouterr().out
    del before[folder / ".lock"]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_results_that_were_changed_need_a_resume(
    folder: Path, finished: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a doctor that blesses weights which no training made."""
    flip(folder / "student.safetensors")
    assert main(["doctor", str(folder), "--mend"]) == EXIT_USER_ERROR
    printed = capsys.readouterr()
    assert "student.safetensors is not what the run exported" in printed.out
    assert "--resume` exports it again from the newest checkpoint" in printed.out
    assert printed.err.startswith("error: 1 thing is wrong")
    run(finished, resume=True)
    assert examine(folder) == []


def test_exported_values_that_are_not_finite_are_found(folder: Path) -> None:
    """Catches an export of an older version: exit code 0 and NaN inside, and a record that fits."""
    path = folder / "student.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).fill_(torch.nan)
    save_file(tensors, path)
    record = read_record(folder)
    assert record is not None
    results = {**record.results, path.name: describe_result(path)}
    write_record(folder, replace(record, results=results))
    (finding,) = examine(folder)
    assert "student.safetensors holds values that are not finite" in finding.problem


def test_a_run_in_use_is_not_mended(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a doctor that deletes the partial files of a save that is going on."""
    leave_partials(folder)
    with lock_folders(folder):
        assert main(["doctor", str(folder)]) == 0
        printed = capsys.readouterr().out
        assert "in use by process" in printed
        assert "WRONG" not in printed
        assert main(["doctor", str(folder), "--mend"]) == EXIT_USER_ERROR
    assert "is in use by process" in capsys.readouterr().err
    assert (folder / "checkpoints" / ".tmp-student_update=000004").exists()


def test_checkpoints_are_verified_and_inspected(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Catches `verify` for data alone, and a checkpoint that no command can describe."""
    checkpoint = folder / "checkpoints" / "student_update=000003"
    assert main(["verify", str(checkpoint)]) == 0
    assert "student update 3, 1 files, as written, all values finite" in capsys.readouterr().out
    assert main(["inspect", str(checkpoint)]) == 0
    printed = capsys.readouterr().out
    for wanted in ("causal_student", "student_updates 3", "samples 24", "also there", "torch 2."):
        assert wanted in printed, printed
    assert main(["inspect", str(folder)]) == 0
    assert "exported after 3 student updates: student.safetensors" in capsys.readouterr().out
    flip(checkpoint / TENSORS)
    assert main(["verify", str(checkpoint)]) == EXIT_USER_ERROR
    assert "is damaged: shard-00001" in capsys.readouterr().err
    assert main(["verify", str(folder)]) == EXIT_USER_ERROR
    assert "selfforcing-dfd doctor" in capsys.readouterr().err
    assert main(["doctor", str(tmp_path / "nowhere")]) == EXIT_USER_ERROR
    assert "is no run's folder" in capsys.readouterr().err


def test_checkpoints_that_are_gone_are_missed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a run that verify calls whole and that cannot go on. A finished one needs none."""
    shutil.rmtree(folder / "checkpoints")
    assert main(["verify", str(folder)]) == 0
    record = read_record(folder)
    assert record is not None
    write_record(folder, replace(record, state="training"))
    assert main(["verify", str(folder)]) == EXIT_USER_ERROR
    assert "but its checkpoints are gone" in capsys.readouterr().err
