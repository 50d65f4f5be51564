"""Checkpoints that are damaged, or of another model: explained, and nothing is changed."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_checkpoint import TENSORS, Run, assert_same, make_network, names, small_state
from torch import Tensor

from selfforcing_dfd.common import sealed
from selfforcing_dfd.training.checkpoint import CheckpointManager
from selfforcing_dfd.training.clock import Clock
from selfforcing_dfd.weights.checkpoint_files import CheckpointError, describe_files, read_meta
from selfforcing_dfd.weights.tensors import model_fingerprint


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def remove(path: Path) -> None:
    path.unlink()


def flip(path: Path) -> None:
    """One bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def spoil(path: Path) -> None:
    """NaN among the values, with hashes that fit: what an older version could write."""
    save_file({"weights.w": torch.full((1000,), torch.nan)}, path)
    meta = json.loads((path.parent / "meta.json").read_text())
    meta["files"] = describe_files([path])
    (path.parent / "meta.json").write_text(json.dumps(sealed(meta)))


@pytest.mark.parametrize("harm", [flip, spoil])
def test_the_newest_good_checkpoint_wins(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: Any
) -> None:
    """Catches a requeue loop: the newest is whole by its sizes, and every load of it fails.

    It stays, under a name that nothing takes for a checkpoint, and the run goes on before it.
    """
    manager = CheckpointManager(tmp_path)
    for step in (1, 2, 3):
        newest = manager.save(step, small_state(step))
    harm(newest / TENSORS)
    with caplog.at_level(logging.WARNING):
        found = manager.latest()
    assert found is not None and found.name == "student_update=000002"
    assert names(tmp_path)[0] == "damaged-student_update=000003"
    assert "student_update=000003 is passed over: " in caplog.text
    state = small_state(0)
    manager.load(found, state)
    assert state["step"] == 2
    manager.save(3, small_state(3))
    harm(newest / TENSORS)
    assert manager.latest() == found
    assert names(tmp_path)[:2] == [
        "damaged-2-student_update=000003",
        "damaged-student_update=000003",
    ]


@pytest.mark.parametrize("part", range(3))
def test_a_flipped_bit_in_the_meta_file_changes_no_value_unseen(tmp_path: Path, part: int) -> None:
    """Catches `clock.samples` off by a power of two: a resume to other weights, without a word."""
    state: dict[str, Any] = {"clock": {"samples": 1000}, "weights": {"w": torch.ones(8)}}
    path = CheckpointManager(tmp_path, config={"lr": 0.1}).save(1, state)
    data = (path / "meta.json").read_bytes()
    before = json.loads(data)
    for place in range(part, len(data), 7):
        changed = bytearray(data)
        changed[place] ^= 1 << (place % 7)
        (path / "meta.json").write_bytes(changed)
        try:
            read_meta(path)
        except CheckpointError:
            continue
        assert json.loads(changed) == before, place


def test_a_checkpoint_from_before_there_were_seals_is_read(tmp_path: Path) -> None:
    """Catches a run that cannot go on because a later version wrote none of its checkpoints."""
    manager = CheckpointManager(tmp_path)
    path = manager.save(1, small_state(1))
    meta = json.loads((path / "meta.json").read_text())
    del meta["sha256"]
    (path / "meta.json").write_text(json.dumps(meta))
    latest = manager.latest()
    assert latest == path
    manager.load(latest, small_state(0))


@pytest.mark.parametrize("damage", [truncate, remove])
@pytest.mark.parametrize("name", [TENSORS, "meta.json"])
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: Any
) -> None:
    """Catches meta.json alone as the mark of a whole checkpoint, whatever became of the tensors."""
    manager = CheckpointManager(tmp_path)
    before = manager.save(1, small_state(1))
    newest = manager.save(2, small_state(2))
    damage(newest / name)
    with caplog.at_level(logging.WARNING):
        assert manager.latest() == before
    assert "student_update=000002 is passed over: " in caplog.text
    assert name in caplog.text
    with pytest.raises(
        CheckpointError,
        match=r"000002 is no complete checkpoint: .*Complete .* \['student_update=000001'\]",
    ):
        manager.load(newest, small_state(0))


def test_flipped_bits_are_found_on_load(tmp_path: Path) -> None:
    """Catches a disk that changes content but not size.

    Training would go on from weights that no training made.
    """
    manager = CheckpointManager(tmp_path)
    path = manager.save(1, small_state(1))
    flip(path / TENSORS)
    state = small_state(0)
    with pytest.raises(
        CheckpointError, match=r"is damaged: shard-00001.*resume from the one before it"
    ):
        manager.load(path, state)
    assert torch.equal(state["weights"]["w"], torch.zeros(1000))


def test_nothing_there_is_no_checkpoint(tmp_path: Path) -> None:
    """Catches FastGen's silent restart: a wrong path must not train from scratch."""
    assert CheckpointManager(tmp_path / "none").latest() is None
    with pytest.raises(CheckpointError, match=r"meta.json: No such file or directory"):
        CheckpointManager(tmp_path).load(tmp_path / "student_update=000040", small_state(0))


def test_another_format_is_named(tmp_path: Path) -> None:
    """Catches a later version's checkpoint read as if it were ours."""
    manager = CheckpointManager(tmp_path)
    path = manager.save(1, small_state(1))
    meta = read_meta(path) | {"format_version": 99}
    (path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match="has format 99, this version reads 2"):
        manager.load(path, small_state(0))


def test_a_checkpoint_of_another_model_is_explained_and_changes_nothing(tmp_path: Path) -> None:
    """Catches a partial load, DCP's silent cast of dtypes, and a traceback of 40 lines."""
    manager = CheckpointManager(tmp_path)
    run = Run()
    run.train(2)
    path = manager.save(2, run.state())
    other = Run(width=9)
    before = other.bits()
    with pytest.raises(
        CheckpointError,
        match=r"(?s)made by another model, 35 of .*checkpoint \[8, 3\] float32, now \[9, 3\]",
    ):
        manager.load(path, other.state())
    assert_same(other.bits(), before)
    assert other.clock == Clock()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"w": torch.zeros(1000, dtype=torch.float64)},
            r"w: checkpoint \[1000\] float32, now \[1000\] float64",
        ),
        (
            {"w": torch.zeros(1000), "extra": torch.zeros(1)},
            r"weights.extra: checkpoint absent, now \[1\] float32",
        ),
        ({"v": torch.zeros(1000)}, r"weights.w: checkpoint \[1000\] float32, now absent"),
    ],
)
def test_every_kind_of_mismatch_is_named(
    tmp_path: Path, change: dict[str, Tensor], message: str
) -> None:
    """Catches a check of common keys only: DCP casts dtypes and ignores other keys."""
    manager = CheckpointManager(tmp_path)
    path = manager.save(1, small_state(1))
    with pytest.raises(CheckpointError, match=message):
        manager.load(path, {"weights": change, "step": 0})
    with pytest.raises(CheckpointError, match="step: checkpoint int, now float"):
        manager.load(path, {"weights": {"w": torch.zeros(1000)}, "step": 0.0})


def test_another_teacher_is_refused(tmp_path: Path) -> None:
    """Catches a resume beside another frozen teacher, which no stored tensor would reveal."""
    teachers = [
        {"teacher": model_fingerprint(make_network(name, 4))} for name in ("first", "second")
    ]
    path = CheckpointManager(tmp_path, models=teachers[0]).save(1, small_state(1))
    with pytest.raises(
        CheckpointError,
        match=r"made by another model, 1 of .*\n  teacher \(fingerprint\): checkpoint ",
    ):
        CheckpointManager(tmp_path, models=teachers[1]).load(path, small_state(0))
    CheckpointManager(tmp_path, models=teachers[0]).load(path, small_state(0))
