"""Which runs a journey makes, what is refused, and what the whole of it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from selfforcing_dfd.cli.main import main
from selfforcing_dfd.common import EXIT_USER_ERROR
from selfforcing_dfd.config import as_dict
from selfforcing_dfd.journey.budget import estimate_of, run_cost
from selfforcing_dfd.journey.checkpoint import Checkpoint, JourneyError, inspect_checkpoint
from selfforcing_dfd.journey.recipes import Plan, as_given, make_plan
from selfforcing_dfd.journey.record import Record
from selfforcing_dfd.journey.request import Request
from selfforcing_dfd.journey.upload import check_repository, upload
from selfforcing_dfd.models.identity import SELF_FORCING
from selfforcing_dfd.models.sizes import PUBLISHED_SIZES
from selfforcing_dfd.stages import load_config
from selfforcing_dfd.training.estimate import GPUS, gpu_hours
from selfforcing_dfd.training.plan import run_flops
from selfforcing_dfd.weights.read import Description

WAN = "weights/Wan2.1-T2V-1.3B-Diffusers"  # is not there: its size is known by its name
STUDENT = "assets/tiny/student.safetensors"


def request_for(out: Path, **changes: Any) -> Request:
    settings: dict[str, Any] = {"videos": out / "videos", "out": out, "clips": None, **changes}
    return Request(**settings)


def wan_student() -> Checkpoint:
    """Self-Forcing's published student, without its file."""
    sizes = {**PUBLISHED_SIZES["wan1.3b"], "out_channels": 16, "patch_size": (1, 2, 2)}
    found = Description(
        source="self_forcing_dmd.pt",
        format="torch file",
        sizes=sizes,
        role="causal_student",
        recipe=None,
        data=None,
        num_parameters=1_418_996_800,
        entries=("generator_ema",),
    )
    return Checkpoint(f"{WAN}/student.pt", "", found, "causal_student", SELF_FORCING, "wan")


@pytest.fixture
def wan_plan(tmp_path: Path) -> Plan:
    request = request_for(tmp_path, model=tmp_path / "wan", teacher=WAN)
    return make_plan(request, wan_student())


def test_the_causal_teacher_that_is_missing_is_made_first(wan_plan):
    """Catches a journey that stops at a file which nobody has."""
    assert list(wan_plan.runs) == ["causal", "student"]
    causal, student = wan_plan.runs.values()
    assert causal.run.stage == "causal"
    assert causal.weights.student == WAN
    assert student.weights.causal == f"{causal.run.out}/causal/student.safetensors"
    assert student.run.stage == "regression"
    assert student.rollout.noise == "kept"
    assert student.weights.student == "", "recipe `stable` starts from the causal teacher"
    given = as_given(wan_plan)
    assert given is not None
    assert given.rollout.noise == "fresh", "the student that came is shown as it runs"


def test_the_budget_is_that_of_the_recipes(wan_plan):
    """Catches hours that nobody was told: of the causal teacher, 142 of an H100."""
    assert wan_plan.causal is not None
    cost = run_cost(estimate_of(wan_plan, wan_plan.causal), 1)
    assert cost.flops == run_flops(load_config("wan1.3b/init_tf"))
    assert gpu_hours(cost.flops, GPUS[0]) == pytest.approx(142.4, abs=0.1)
    assert cost.memory is not None
    assert cost.memory > 20e9
    assert cost.disk > 3 * 4 * 4 * 1.4e9, "three checkpoints with moments and average"
    arm = load_config("wan1.3b/dfd_ar").arms["stable"]
    assert f"run.student_updates={wan_plan.student.run.student_updates}" in arm


def test_data_forcing_warms_the_fake_score_up(tmp_path):
    """Catches a fake score that meets the student for the first time in its own update."""
    checkpoint = inspect_checkpoint(STUDENT)
    plan = make_plan(request_for(tmp_path, method="noised_real", fake_updates=60), checkpoint)
    fake, student = plan.runs.values()
    assert fake.run.stage == "dmd"
    assert fake.run.student_updates == 3
    assert as_dict(fake)["score"]["fake_per_student"] == 20, "60 in cycles of at most 25"
    assert fake.optim.student.lr < 1e-20, "the student stays as it is"
    assert student.weights.student == STUDENT
    assert student.weights.fake == f"{tmp_path}/fake/fake.safetensors"
    assert student.rollout.noise == "fresh"
    named = make_plan(
        request_for(tmp_path, method="noised_real", fake="assets/tiny/fake.safetensors"), checkpoint
    )
    assert list(named.runs) == ["student"]


def test_settings_reach_the_runs_that_they_are_for(tmp_path):
    """Catches a batch that only the last run has, and a number of updates that all have."""
    overrides = ("batch.micro=4", "batch.size=4", "run.student_updates=7")
    request = request_for(tmp_path, method="noised_real", overrides=overrides)
    fake, student = make_plan(request, inspect_checkpoint(STUDENT)).runs.values()
    assert (fake.batch.size, student.batch.size) == (4, 4)
    assert (fake.run.student_updates, student.run.student_updates) == (4, 7)
    with pytest.raises(JourneyError, match=r"data\.shards=x: the journey sets this itself"):
        make_plan(request_for(tmp_path, overrides=("data.shards=x",)), inspect_checkpoint(STUDENT))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("assets/tiny/fake.safetensors", "v"), "is a fake score; a journey begins with a causal"),
        (("assets/tiny/causal.safetensors", "v", "--recipe", "noised_real"), "goes on from a few"),
        ((STUDENT, "v", "--frames", "32"), "--frames is 32; want 1 + 4 n, such as 29 or 33"),
        ((STUDENT, "v", "--role", "teacher"), "says that it is a causal_student; leave --role"),
        ((STUDENT, "v", "--push-to-hub", "a/b/c"), "want NAME or OWNER/NAME"),
        ((STUDENT, "v", "--causal", "lost.pt"), "weights.causal is lost.pt, which does not exist"),
        ((STUDENT, "v", "--model", "nowhere"), "hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
        ((STUDENT, "nowhere"), "nowhere: no such folder"),
    ],
)
def test_mistakes_end_in_one_line(words, told, tmp_path, monkeypatch, capsys):
    """Catches a mistake that is found after hours, or told in a traceback."""
    monkeypatch.chdir(tmp_path)
    assert main(["distil", *words]) == EXIT_USER_ERROR
    assert told in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_second_process_is_sent_to_train(tmp_path, monkeypatch, capsys):
    """Catches eight processes that all pack the same clips."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert main(["distil", STUDENT, "v", "--out", str(tmp_path)]) == EXIT_USER_ERROR
    assert "train --config OUT/configs/student.yaml --resume" in capsys.readouterr().err


def test_a_record_by_another_hand_is_refused(tmp_path):
    """Catches a step that is skipped because somebody wrote that it was done."""
    record = Record(tmp_path)
    (tmp_path / "result").write_text("1")
    record.note("pack", {"videos": "a"}, [tmp_path / "result"])
    assert Record(tmp_path).steps == record.steps
    assert Record(tmp_path).changed_inputs("pack", {"videos": "b"}) == ["videos"]
    assert record.lost_result("pack") == ""
    (tmp_path / "result").write_text("2")
    assert record.lost_result("pack") == "result"
    path = tmp_path / "journey.json"
    path.write_text(path.read_text().replace('"videos": "a"', '"videos": "b"'))
    with pytest.raises(JourneyError, match="is not what was written"):
        Record(tmp_path)


class StubApi:
    """What stands for the Hub: it remembers what was asked of it. (No request leaves the test.)"""

    calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, name: str, **options: Any) -> Any:
        self.calls.append(("create", {"name": name, **options}))
        return type("Made", (), {"repo_id": f"me/{name}"})

    def upload_folder(self, **options: Any) -> Any:
        self.calls.append(("upload", options))
        if not list(Path(options["folder_path"]).glob("README.md")):
            raise OSError("there is no card")
        return type("Done", (), {"commit_url": "https://hub/me/x/commit/1"})


def test_the_export_is_pushed_whole(tmp_path, monkeypatch):
    """Catches an upload to another repository, or of another folder; by a stub of the client."""
    monkeypatch.setattr("huggingface_hub.HfApi", StubApi)
    monkeypatch.setattr(StubApi, "calls", [])
    with pytest.raises(JourneyError, match=r"x could not be written: there is no card; log in"):
        upload(tmp_path, "x")
    (tmp_path / "README.md").touch()
    assert upload(tmp_path, "x", private=True) == "pushed to https://hub/me/x/commit/1"
    (_, made), (_, sent) = StubApi.calls[-2:]
    assert made == {"name": "x", "repo_type": "model", "private": True, "exist_ok": True}
    assert sent["repo_id"] == "me/x"
    assert sent["folder_path"] == tmp_path
    check_repository("me/x-1.3B_v2")
