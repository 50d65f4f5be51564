"""A run's folder is of one run: the same goes on, more updates go on, anything else is refused."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from selfforcing_dfd.cli.train import run
from selfforcing_dfd.common import shipped
from selfforcing_dfd.config import Config
from selfforcing_dfd.data.noise import store_noise
from selfforcing_dfd.data.sources.tiny import make_tiny_shards
from selfforcing_dfd.training import exports, identity, one_run
from selfforcing_dfd.training.build import build_network, build_trainer
from selfforcing_dfd.training.folders import run_folder
from selfforcing_dfd.training.tracking import read_metrics
from selfforcing_dfd.weights.run_record import RunError, read_record, write_record
from selfforcing_dfd.weights.runs import student_of
from tests.tiny_models import fill_weights, save_network
from tests.training.conftest import MODEL, finished_run

Settings = Callable[..., Config]
FEW = ("run.stage=dmd", "score.fake_per_student=1", "run.student_updates=2", "checkpoint.every=1")
RESULTS = ("student.safetensors", "fake.safetensors")


@pytest.fixture
def few(settings: Settings) -> Settings:
    """A config of a short run, overrides on top."""
    return lambda *overrides: settings(*FEW, *overrides)


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that run, finished."""
    return run_folder(finished_run(tmp_path_factory.mktemp("finished"), world, *FEW))


@pytest.fixture
def done(finished: Path, few: Settings) -> Settings:
    """As `few`, where that run is finished; its folder is a copy, and may be harmed."""
    shutil.copytree(finished, run_folder(few()))
    return few


@pytest.fixture
def half(done: Settings) -> Settings:
    """As `done`, where the run was killed after the first of its two updates."""
    folder = run_folder(done())
    shutil.rmtree(folder / "checkpoints" / "student_update=000002")
    for name in RESULTS:
        (folder / name).unlink()
    record = read_record(folder)
    assert record is not None
    write_record(folder, replace(record, state="training", results={}, student_updates=0))
    return done


def content(config: Config) -> dict[str, bytes]:
    """Everything in a run's folder but the lock and the journal."""
    folder = run_folder(config)
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (".lock", "journal.jsonl")
    }


def lines_of(config: Config) -> list[dict[str, Any]]:
    """The metrics without what differs from run to run."""
    lines = read_metrics(run_folder(config) / "metrics.jsonl")
    return [{**line, "seconds": 0, "core_seconds": 0} for line in lines]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run.seed=5"], r"run\.seed: the run 0, now 5"),
        (["optim.student.lr=0.5"], r"optim\.student\.lr: the run 0\.001, now 0\.5"),
        (["run.student_updates=1"], r"has made 2, and a run cannot be shortened"),
        (["run.student_updates=4", "optim.fake.decay=0.1"], r"optim\.fake\.decay: the run 1\.0"),
    ],
)
def test_a_finished_run_is_never_another(
    done: Settings, overrides: list[str], message: str
) -> None:
    """Catches a fabricated record: `already trained`, and a report with settings of no training."""
    before = content(done())
    with pytest.raises(RunError, match=message):
        run(done(*overrides), resume=True)
    assert content(done()) == before
    run(done("log.project=other", "data.workers=1"), resume=True)
    assert content(done()) == before


def test_more_updates_go_on_from_a_finished_run(done: Settings, tmp_path: Path) -> None:
    """Catches `run.student_updates` without effect on a finished run, and a second half that is
    not that of one run over all of them.
    """
    parts = done("run.student_updates=4")
    run(parts, resume=True)
    whole = done("run.student_updates=4", f"run.out={tmp_path / 'whole'}")
    run(whole)
    for name in RESULTS:
        assert (run_folder(parts) / name).read_bytes() == (run_folder(whole) / name).read_bytes()
    assert lines_of(parts) == lines_of(whole)
    record = read_record(run_folder(parts))
    assert record is not None
    assert (record.state, record.student_updates) == ("finished", 4)


@pytest.mark.parametrize("state", ["finished", "training"])
def test_a_falling_learning_rate_fixes_the_number_of_updates(few: Settings, state: Any) -> None:
    """Catches a longer run whose first half had the rates of a shorter one: no setting says so."""
    falling = "optim.student.decay=0.1"
    run(few(falling))
    record = read_record(run_folder(few()))
    assert record is not None
    write_record(run_folder(few()), replace(record, state=state))
    with pytest.raises(RunError, match=r"optim\.student\.decay .* began with 2, and 4 are asked"):
        run(few(falling, "run.student_updates=4"), resume=True)
    run(few(falling), resume=True)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def junk(path: Path) -> None:
    path.write_bytes(b"not weights")


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 64
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [empty, junk, flipped, Path.unlink])
@pytest.mark.parametrize("name", RESULTS)
def test_weights_that_were_changed_are_exported_again(
    done: Settings, caplog: pytest.LogCaptureFixture, harm: Callable[[Path], None], name: str
) -> None:
    """Catches `already trained` for an empty file. What lay there is kept under another name."""
    path = run_folder(done()) / name
    before = content(done())
    harm(path)
    harmed = path.read_bytes() if path.exists() else None
    with caplog.at_level(logging.WARNING):
        run(done(), resume=True)
    after = content(done())
    assert after.pop(f"damaged-{name}", None) == harmed
    for of_this_place in ("config.yaml", "run.json"):
        del before[of_this_place], after[of_this_place]
    assert after == before
    assert f"{name} " in caplog.text


def test_changed_weights_without_checkpoints_are_refused(done: Settings) -> None:
    """Catches a run that trains from its start again where it can prove nothing."""
    shutil.rmtree(run_folder(done()) / "checkpoints")
    run(done(), resume=True)
    with pytest.raises(RunError, match=r"2 more student updates .* its checkpoints are gone"):
        run(done("run.student_updates=4"), resume=True)
    junk(run_folder(done()) / "student.safetensors")
    with pytest.raises(RunError, match=r"11 bytes, and the run exported .* checkpoints are gone"):
        run(done(), resume=True)


def test_an_unfinished_run_without_its_checkpoints_is_refused(half: Settings) -> None:
    """Catches a resume that begins again without a word and wipes the metrics."""
    shutil.rmtree(run_folder(half()) / "checkpoints")
    before = content(half())
    with pytest.raises(RunError, match=r"has made 2 student updates .* its checkpoints are gone"):
        run(half(), resume=True)
    assert content(half()) == before


def test_another_export_format_is_exported(done: Settings) -> None:
    """Catches `already trained` for weights of another dtype than is asked for."""
    half = (run_folder(done()) / "student.safetensors").stat().st_size
    run(done("checkpoint.export=float32"), resume=True)
    assert (run_folder(done()) / "student.safetensors").stat().st_size > 1.5 * half
    assert not list(run_folder(done()).glob("damaged-*"))


def test_weights_are_known_by_their_content(few: Settings, world: Path, tmp_path: Path) -> None:
    """Catches a start that was replaced under its name, and one that was only moved refused."""
    moved = tmp_path / "teacher.safetensors"
    shutil.copyfile(world / "teacher.safetensors", moved)
    run(few(f"weights.teacher={moved}"))
    before = content(few())
    run(few(), resume=True)
    assert content(few()) == before
    other = build_network(MODEL)
    fill_weights(other, seed=9)
    save_network(moved, other)
    with pytest.raises(RunError, match=r"weights\.teacher: the file is not the one that the run"):
        run(few(f"weights.teacher={moved}", "run.student_updates=3"), resume=True)


def test_clips_are_known_by_their_content(few: Settings, tmp_path: Path) -> None:
    """Catches a run that is of other clips, and one refused for noise that it never reads."""
    basis = shipped("assets/tiny/codec.safetensors")
    for name, seed in (("own", 1), ("other", 2)):
        make_tiny_shards(tmp_path / name, 8, seed, "short", 9, basis)
    run(few(f"data.shards={tmp_path / 'own'}"))
    before = content(few())
    with pytest.raises(RunError, match=r"data\.shards: the clips, their captions or their noise"):
        run(few(f"data.shards={tmp_path / 'other'}"), resume=True)
    store_noise(tmp_path / "own", lambda x, text, noise: noise, noise_fingerprint="t")
    run(few(f"data.shards={tmp_path / 'own'}"), resume=True)
    assert content(few()) == before


def test_a_stop_while_exporting_is_no_finished_run(
    few: Settings, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a fake score of this run beside a student of none, and both taken for finished."""
    save = exports.save_weights

    def dies(path: Path, *rest: Any) -> None:
        if path.name == "student.safetensors":
            raise KeyboardInterrupt
        save(path, *rest)

    monkeypatch.setattr(exports, "save_weights", dies)
    with pytest.raises(KeyboardInterrupt):
        run(few())
    monkeypatch.setattr(exports, "save_weights", save)
    record = read_record(run_folder(few()))
    assert record is not None and record.state == "training"
    run(few(), resume=True)
    for name in RESULTS:
        assert (run_folder(few()) / name).read_bytes() == (finished / name).read_bytes()
    assert not list(run_folder(few()).glob("damaged-*"))


def older(config: Config) -> Path:
    """A folder as versions without run.json left it."""
    (run_folder(config) / "run.json").unlink()
    return run_folder(config)


@pytest.mark.parametrize("state", ["done", "half"])
def test_a_folder_of_an_older_version_is_adopted(
    few: Settings, finished: Path, request: pytest.FixtureRequest, state: str
) -> None:
    """Catches an old run that is lost, and one whose weights are believed without a checkpoint."""
    request.getfixturevalue(state)
    folder = older(few())
    with pytest.raises(RunError, match=r"run\.seed: the run 0, now 3"):
        run(few("run.seed=3"), resume=True)
    run(few(), resume=True)
    for name in RESULTS:
        assert (folder / name).read_bytes() == (finished / name).read_bytes()
    assert not list(folder.glob("damaged-*"))
    record = read_record(folder)
    assert record is not None and record.state == "finished"


def test_an_older_folder_without_proof_is_refused(done: Settings) -> None:
    """Catches weights of an unknown run under a record that this program made up."""
    folder = older(done())
    (folder / "config.yaml").rename(folder / "elsewhere.yaml")
    with pytest.raises(RunError, match=r"neither run\.json nor config\.yaml"):
        run(done(), resume=True)
    (folder / "elsewhere.yaml").rename(folder / "config.yaml")
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(RunError, match=r"neither run\.json nor checkpoints, so nothing shows"):
        run(done(), resume=True)


def test_a_record_that_was_changed_is_not_believed(done: Settings) -> None:
    """Catches a record in which somebody wrote more updates, or of which a bit flipped."""
    path = run_folder(done()) / "run.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"student_updates": 400}))
    with pytest.raises(RunError, match=r"SHA-256 differs.*doctor .* --mend"):
        run(done(), resume=True)
    with pytest.raises(RunError, match="SHA-256 differs"):
        student_of(run_folder(done()))


def test_readers_take_only_what_the_run_exported(
    done: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a stream or a model card of weights that somebody put into a run's folder."""
    folder = run_folder(done())
    assert student_of(folder) == folder / "student.safetensors"
    caplog.clear()
    flipped(folder / "student.safetensors")
    with pytest.raises(RunError, match=r"is not what the run exported \(SHA-256 differs\)"):
        student_of(folder)
    flipped(folder / "student.safetensors")
    older(done())
    assert student_of(folder) == folder / "student.safetensors"
    assert "has no run.json, so nothing shows what student.safetensors was" in caplog.text


def test_the_code_that_trained_is_noted(done: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches updates by two versions of the code that are told as one version's."""
    now = identity.running_code()
    monkeypatch.setattr(one_run, "running_code", lambda: {**now, "source": "other"})
    run(done("run.student_updates=3"), resume=True)
    record = read_record(run_folder(done()))
    assert record is not None
    assert [(code["source"], code["since"]) for code in record.code] == [
        (now["source"], 0),
        ("other", 2),
    ]


def test_a_run_that_is_shorter_than_its_checkpoint_is_refused(half: Settings) -> None:
    """Catches a student of two updates that is exported as one of another number."""
    build_trainer(half(), resume=True).run()
    with pytest.raises(RunError, match="has made 2, and a run cannot be shortened"):
        run(half("run.student_updates=1"), resume=True)
