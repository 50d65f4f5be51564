"""Values that are not finite: never stored, and training goes back and leaves the samples out."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from selfforcing_dfd.cli.train import run
from selfforcing_dfd.common import UserError, sealed
from selfforcing_dfd.config import Config
from selfforcing_dfd.data.shards import ShardReader
from selfforcing_dfd.training import loop
from selfforcing_dfd.training.build import build_trainer
from selfforcing_dfd.training.checkpoint import CheckpointManager
from selfforcing_dfd.training.finite import NonFiniteError
from selfforcing_dfd.training.folders import run_folder
from selfforcing_dfd.training.healing import RetriesError
from selfforcing_dfd.training.tracking import read_metrics
from selfforcing_dfd.weights.run_record import RunRecord, read_record
from selfforcing_dfd.weights.stored import WeightsError
from selfforcing_dfd.weights.tensors import save_weights

Settings = Callable[..., Config]
FEW = (
    *("run.stage=dmd", "score.fake_per_student=1", "run.student_updates=4", "checkpoint.every=1"),
    *("batch.size=2", "batch.micro=2"),
)


def record_of(config: Config) -> RunRecord:
    record = read_record(run_folder(config))
    assert record is not None
    return record


def events(config: Config) -> list[str]:
    lines = (run_folder(config) / "journal.jsonl").read_text().splitlines()
    return [json.loads(line)["event"] for line in lines]


def spoilt_shards(world: Path, out: Path, value: float, sample: int) -> Path:
    """The shards with one value of one sample changed; sums and seals are right."""
    shutil.copytree(world / "shards", out)
    path = out / "index.json"
    index = json.loads(path.read_text())
    entry = index["samples"][sample]
    offset, size, _ = entry["members"]["latent.npy"]
    shard = out / entry["shard"]
    data = bytearray(shard.read_bytes())
    data[offset + size - 2 : offset + size] = np.float16(value).tobytes()
    shard.write_bytes(data)
    entry["members"]["latent.npy"][2] = zlib.crc32(data[offset : offset + size])
    path.write_text(json.dumps(sealed(index)))
    return out


def test_a_sample_that_is_not_finite_is_left_out(
    settings: Settings, world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a run that can never pass: it stops at the sample, and a resume meets it again."""
    plain = build_trainer(settings(*FEW, "run.name=plain"))
    bad = plain.order.sample_at(6)  # the fourth turn
    shards = spoilt_shards(world, tmp_path / "spoilt", float("nan"), bad)
    key = ShardReader(shards).index.samples[bad].key
    config = settings(*FEW, f"data.shards={shards}")
    run(config)
    record = record_of(config)
    assert record.aside == {key: 6}
    assert (record.state, record.retries) == ("finished", 1)
    assert f"{key}.latent.npy holds values that are not finite" in caplog.text
    wanted = ["training", "not finite", "went back", "training", "finished"]
    assert events(config) == wanted
    keys = [
        (line["kind"], line["count"]) for line in read_metrics(run_folder(config) / "metrics.jsonl")
    ]
    assert keys == [(kind, count) for count in range(1, 5) for kind in ("fake", "student")]
    before = (run_folder(config) / "student.safetensors").read_bytes()
    run(config, resume=True)
    assert (run_folder(config) / "student.safetensors").read_bytes() == before


def test_a_run_that_left_samples_out_goes_on_exactly(
    settings: Settings, world: Path, tmp_path: Path
) -> None:
    """Catches a resume that forgets what was left out, or leaves it out before its turn came."""
    plain = build_trainer(settings(*FEW, "run.name=plain"))
    bad = plain.order.sample_at(3)
    shards = spoilt_shards(world, tmp_path / "spoilt", float("inf"), bad)
    whole = settings(*FEW, f"data.shards={shards}", f"run.out={tmp_path / 'whole'}")
    run(whole)
    parts = settings(*FEW, f"data.shards={shards}", f"run.out={tmp_path / 'parts'}")
    for updates in (1, 2, 4):
        few = settings(
            *FEW,
            f"data.shards={shards}",
            f"run.out={tmp_path / 'parts'}",
            f"run.student_updates={updates}",
        )
        run(few, resume=True)
    for name in ("student.safetensors", "fake.safetensors"):
        assert (run_folder(parts) / name).read_bytes() == (run_folder(whole) / name).read_bytes()
    assert record_of(parts).aside == record_of(whole).aside


def largest(learner: loop.Learner) -> torch.nn.Parameter:
    """A weight of which every process holds a part."""
    return max(learner.network.parameters(), key=lambda weight: weight.numel())


class Spoiler:
    """Makes the loss, or a weight after the step, not finite in some turns of a run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, what: str, bad: Callable[[Any], bool]):
        self.what = what
        self.bad = bad
        self.backward = loop.Trainer.backward
        monkeypatch.setattr(loop.Trainer, "backward", self)

    def __get__(self, trainer: Any, kind: type) -> Callable[..., Any]:
        def backward(turn: str, batch: Any, draw: Any) -> Any:
            part = self.backward(trainer, turn, batch, draw)
            if self.bad(draw):
                self.spoil(part, trainer.learners[turn])
            return part

        return backward

    def spoil(self, part: Any, learner: loop.Learner) -> None:
        weight = largest(learner)
        if self.what == "loss":
            part.loss.data.fill_(float("nan"))
        elif self.what == "gradient":
            assert weight.grad is not None
            weight.grad.fill_(float("inf"))
        else:
            # found anew: with several processes it is another tensor amid a turn
            learner.optimizers[0].register_step_post_hook(
                lambda *_: largest(learner).data.fill_(float("nan"))
            )


@pytest.mark.parametrize("what", ["loss", "gradient", "weights"])
@pytest.mark.parametrize("first_bad", [0, 6])
def test_training_heals_itself(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, what: str, first_bad: int
) -> None:
    """Catches a run that a single bad turn ends, before its first checkpoint or after some."""
    config = settings(*FEW)
    healed: list[bool] = []

    def bad(draw: Any) -> bool:
        once = draw.update_start == first_bad and not healed
        if once:
            healed.append(True)
        return once

    Spoiler(monkeypatch, what, bad)
    run(config)
    record = record_of(config)
    assert (record.state, record.retries, len(record.aside)) == ("finished", 1, 2)
    assert set(record.aside.values()) == {first_bad}
    weights = load_file(run_folder(config) / "student.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_retries_are_bounded_also_over_resumes(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an unattended run that sets one sample after the other aside until none is left."""
    config = settings(*FEW, "run.retries=2")
    Spoiler(monkeypatch, "loss", lambda draw: draw.update_start >= 6)
    with pytest.raises(RetriesError, match=r"went back to a checkpoint 2 times \(run\.retries"):
        run(config)
    assert (record_of(config).retries, len(record_of(config).aside)) == (2, 4)
    with pytest.raises(RetriesError, match=r"lower learning rate.*raise run\.retries"):
        run(config, resume=True)
    assert record_of(config).state == "training"
    names = [path.name for path in (run_folder(config) / "checkpoints").iterdir()]
    assert names == ["student_update=000001"]
    monkeypatch.undo()
    run(config, resume=True)
    assert record_of(config).state == "finished"


def test_one_sample_alone_is_blamed_where_it_can_be(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a whole batch set aside for a finite sample whose loss overflows."""
    config = settings(*FEW)
    trainer = build_trainer(settings(*FEW, "run.name=plain"))
    bad = trainer.reader.index.samples[trainer.order.sample_at(5)].key
    stage = type(trainer.stage)
    original = stage.loss

    def loss(self: Any, turn: str, batch: Any, draw: Any, student_updates: int) -> Any:
        part = original(self, turn, batch, draw, student_updates)
        if bad in batch.keys:
            part.loss.data.fill_(float("inf"))
        return part

    monkeypatch.setattr(stage, "loss", loss)
    run(config)
    assert record_of(config).aside == {bad: 4}


def test_weights_that_are_not_finite_cannot_be_stored(settings: Settings, tmp_path: Path) -> None:
    """Catches an lr blow-up in the last update: exit code 0 and an export of 8,576 NaNs."""
    trainer = build_trainer(settings(*FEW))
    trainer.run()
    student = trainer.learners["student"].network
    checkpoints = run_folder(settings(*FEW)) / "checkpoints"
    before = sorted(path.name for path in checkpoints.iterdir())
    for tensors in (trainer.ema.shadow, dict(student.named_parameters())):
        name = next(iter(tensors))
        kept = tensors[name].detach().clone()
        tensors[name].data.view(-1)[0] = float("nan")
        with pytest.raises(NonFiniteError, match=rf"{name} is not finite in 1 of"):
            trainer.save()
        tensors[name].data.copy_(kept)
    assert sorted(path.name for path in checkpoints.iterdir()) == before
    moments = trainer.learners["student"].optimizers[0].state
    next(iter(moments.values()))["exp_avg_sq"].fill_(float("inf"))
    with pytest.raises(NonFiniteError, match="exp_avg_sq is not finite"):
        trainer.save()
    with pytest.raises(WeightsError, match=r"w is not finite, so .*student\.safetensors is not"):
        save_weights(tmp_path / "student.safetensors", {"w": torch.tensor([1.0, torch.nan])})
    assert not (tmp_path / "student.safetensors").exists()


def test_values_found_at_a_save_are_healed(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run that ends where only its average or its moments overflowed."""
    config = settings(*FEW)
    save = CheckpointManager.save
    spoilt: list[int] = []

    def spoils(self: CheckpointManager, update: int, state: dict[str, Any]) -> Path:
        if update == 3 and not spoilt:
            spoilt.append(update)
            next(iter(state["ema"].shadow.values())).fill_(float("nan"))
        return save(self, update, state)

    monkeypatch.setattr(CheckpointManager, "save", spoils)
    run(config)
    record = record_of(config)
    assert (record.state, record.retries) == ("finished", 1)
    assert set(record.aside.values()) == {10}  # the third student turn, the sixth of all


def test_a_request_to_stop_is_not_forgotten(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run that goes back and trains on although it was asked to stop."""
    config = settings(*FEW)

    def stops(self: Any, *arguments: Any) -> Any:
        self.stop_requested = True
        raise NonFiniteError("loss is nan")

    monkeypatch.setattr(loop.Trainer, "take_turn", stops)
    with pytest.raises(NonFiniteError):
        run(config)


def test_weights_to_start_from_must_be_finite(
    settings: Settings, world: Path, tmp_path: Path
) -> None:
    """Catches samples that are blamed for the weights that training began with."""
    broken = bytearray((world / "teacher.safetensors").read_bytes())
    broken[-4:] = b"\x00\x00\xc0\x7f"  # not a number
    (tmp_path / "student.safetensors").write_bytes(broken)
    with pytest.raises(UserError, match=r"student\.safetensors: .* holds values that are not"):
        run(settings(*FEW, f"weights.student={tmp_path / 'student.safetensors'}"))
