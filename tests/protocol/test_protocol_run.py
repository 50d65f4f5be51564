"""A protocol's way: videos, numbers, features, report; stopped, killed, shared and changed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Script

from selfforcing_dfd.cli.main import main
from selfforcing_dfd.common import EXIT_USER_ERROR, UserError, sha256_of
from selfforcing_dfd.data.sources.video import rate_of
from selfforcing_dfd.metrics.files import frames_of, measure_file
from selfforcing_dfd.protocol import work
from selfforcing_dfd.protocol.plan import Cell
from selfforcing_dfd.protocol.prepared import Prepared, prepare
from selfforcing_dfd.protocol.results import gather
from selfforcing_dfd.protocol.work import Task, Worker, run_tasks
from selfforcing_dfd.training.exclusive import lock_folders

ROOT = Path(__file__).parents[2]


def files_in(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file of videos, numbers and features with its inode and time."""
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for part in ("videos", "numbers", "features")
        for path in sorted((folder / part).rglob("*"))
        if path.is_file()
    }


def first_cell(prepared: Prepared, method: str) -> Cell:
    return prepared.cells(method)[0]


def test_every_method_has_a_video_for_each_prompt_and_seed(finished: tuple[Path, str]):
    """Catches a method that is left out, and videos of another length, size or rate."""
    prepared = prepare(str(finished[0]))
    for method in ("data", "teacher", "one", "two"):
        cells = prepared.cells(method)
        assert len(cells) == 6
        for cell in cells:
            video = prepared.video(cell)
            assert [frame.shape for frame in frames_of(video)] == 9 * [(64, 64, 3)]
            assert rate_of(video) == 16
            prompt = prepared.folder.prompt(cell).read_text()
            assert prompt == f"{cell.prompt.text}\n"
    assert prepared.cells("absent") == []
    out = finished[0].parent / "out"
    assert not list(out.rglob(".tmp-*"))


def test_another_seed_is_another_video_and_the_same_seed_is_the_same(finished: tuple[Path, str]):
    """Catches a seed that does not reach the noise, and noise that is not the same on each run."""
    prepared = prepare(str(finished[0]))
    worker = Worker(prepared, "cpu")
    for method in ("data", "teacher", "one"):
        one, other = prepared.cells(method)[:2]
        make = prepared.method(method, one.prompt.set).load(worker.device)
        frames = torch.cat(list(make(one)))
        assert torch.equal(frames, torch.cat(list(make(one))))
        assert not torch.equal(frames, torch.cat(list(make(other))))
        shown = torch.stack(list(frames_of(prepared.video(one))))
        assert (shown.float() - frames.float()).abs().mean() < 12, "as it was encoded"


def test_a_causal_teacher_goes_on_chunk_by_chunk(plan: Path):
    """Catches a first chunk that depends on the length, and one that the cache cannot bear."""
    text = plan.read_text()
    videos = []
    for latent_frames in (15, 3):
        causal = (
            f"  causal: {{kind: causal, weights: {plan.parent}/causal.safetensors, steps: 1, "
            f"latent_frames: {latent_frames}}}\n"
        )
        plan.write_text(text.replace("  one: {", f"{causal}  one: {{"))
        prepared = prepare(str(plan))
        make = prepared.method("causal", "all").load("cpu")
        videos.append(list(make(prepared.cells("causal")[0])))
    long, short = videos
    assert [len(part) for part in long] == [9, 12, 12, 12, 12]
    assert torch.equal(long[0], short[0])


def test_what_is_there_is_not_made_again(finished: tuple[Path, str]):
    """Catches a second run that loads networks or writes videos, numbers or features again."""
    plan, _ = finished
    before = files_in(plan.parent / "out")
    worker = Worker(prepare(str(plan)), "cpu")
    tasks = [replace(task, make=fail) for task in worker.tasks("all")]
    assert len(tasks) == 24 * 3
    assert run_tasks(tasks) == []
    assert not work.attempt(tasks[0], {}), "another process was quicker"
    assert files_in(plan.parent / "out") == before


def fail() -> None:
    raise AssertionError("made again")


def test_a_changed_plan_is_refused_and_not_mixed(plan: Path):
    """Catches videos of two samplers, and numbers of two definitions, in one table."""
    prepared = prepare(str(plan))
    worker = Worker(prepared, "cpu")
    task, *_ = [each for each in worker.tasks("videos") if each.name.startswith("teacher")]
    assert run_tasks([task]) == []
    text = plan.read_text()
    plan.write_text(text.replace("steps: 1}", "steps: 2}", 1))
    with pytest.raises(UserError, match=r"made with sampler .*'steps': 1.*'steps': 2"):
        run_tasks(Worker(prepare(str(plan)), "cpu").tasks("videos", ["teacher"]))
    plan.write_text(text.replace("a red disc", "a cyan disc"))
    with pytest.raises(UserError, match="made with prompt 'a red disc moves'"):
        run_tasks(Worker(prepare(str(plan)), "cpu").tasks("videos", ["teacher"]))
    plan.write_text(text)
    (plan.parent / "two.safetensors").rename(plan.parent / "teacher.safetensors")
    with pytest.raises(UserError, match="made with weights"):
        run_tasks(Worker(prepare(str(plan)), "cpu").tasks("videos", ["teacher"]))


def test_other_numbers_are_refused(plan: Path):
    """Catches numbers with other stretches or chunks beside those that are there."""
    tasks = Worker(prepare(str(plan)), "cpu").tasks("all", ["data"])
    assert run_tasks(tasks[:1] + tasks[6:7]) == []
    plan.write_text(plan.read_text().replace("window_s: 0.25", "window_s: 1"))
    with pytest.raises(UserError, match=r"made with window_s 0\.25, the plan now says 1\.0"):
        run_tasks(Worker(prepare(str(plan)), "cpu").tasks("numbers", ["data"]))


def test_a_video_that_is_deleted_takes_its_numbers_along(plan: Path):
    """Catches numbers of a video that is not there any more beside a new one."""
    prepared = prepare(str(plan))
    tasks = Worker(prepared, "cpu").tasks("all", ["data"])
    assert run_tasks(tasks) == []
    cell = first_cell(prepared, "data")
    kept = [prepared.folder.numbers(cell), prepared.folder.features(cell, "pixels")]
    before = [path.stat().st_mtime_ns for path in kept]
    prepared.folder.video(cell).unlink()
    assert run_tasks(tasks) == []
    assert all(path.stat().st_mtime_ns > time for path, time in zip(kept, before, strict=True))


def start(plan: Path, name: str) -> Script:
    """The command in a process of its own, which makes and measures the data's videos."""
    folder = plan.parent / name
    folder.mkdir()
    command = ("protocol", str(plan), "--device", "cpu", "--only", "data")
    return Script(folder, "selfforcing_dfd/__main__.py", *command)


def test_a_killed_run_goes_on_with_others(plan: Path):
    """Catches half a video that counts as one, a lock of a dead process, and work done twice."""
    out = plan.parent / "out"
    killed = start(plan, "killed")
    while killed.runs and len(list((out / "videos").rglob("*.mp4"))) < 3:
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    assert killed.end().code == -signal.SIGKILL
    before = {name: at for name, at in files_in(out).items() if ".tmp-" not in name}
    assert 0 < len(before) < 30, "it was killed too early or too late"
    left = out / "videos/data/.tmp-1-002-2.mp4"
    left.write_bytes(b"half a video")
    others = [start(plan, "second"), start(plan, "third")]
    ends = [each.end() for each in others]
    assert [end.code for end in ends] == [0, 0], ends
    after = files_in(out)
    assert not [name for name in after if ".tmp-" in name]
    assert len(after) == 6 * 5, "a video with its text and record, its numbers and its features"
    kept = [name for name in before if name.endswith((".mp4", ".safetensors"))]
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}


def test_a_task_of_another_process_is_waited_for_and_taken_over(tmp_path: Path):
    """Catches a process that ends while others work, or waits for one that died for ever."""
    made = []

    def make() -> None:
        made.append(time.perf_counter())
        (tmp_path / "result").write_text("made")

    task = Task("one", tmp_path / "result", tmp_path / "lock", make)
    fork = multiprocessing.get_context("fork")
    begin = fork.Event()
    # it starts before the lock is taken: a fork would hold it too
    other = fork.Process(target=wait_and_make, args=(begin, task))
    other.start()
    with lock_folders(task.lock):
        begin.set()
        time.sleep(0.3)
        assert other.is_alive(), "it did not wait"
    other.join(timeout=60)
    assert other.exitcode == 0
    assert (tmp_path / "result").read_text() == "made"
    assert run_tasks([task]) == []
    assert made == [], "by this process"


def wait_and_make(begin: Any, task: Task) -> None:
    begin.wait(60)
    work.POLL_S = 0.05
    assert run_tasks([task]) == []


def test_a_video_that_changed_after_it_was_measured_is_named(plan: Path):
    """Catches numbers of one video beside another, and a copied folder that counts as changed."""
    prepared = prepare(str(plan))
    tasks = Worker(prepared, "cpu").tasks("all", ["data"])
    assert run_tasks([*tasks[:2], *tasks[6:8]]) == []
    one, other = [prepared.video(cell) for cell in prepared.cells("data")[:2]]
    os.utime(one, (0, 0))
    assert len(gather(prepared)["data"].cells) == 2
    one.write_bytes(other.read_bytes())
    with pytest.raises(UserError, match=r"000-1\.mp4 has changed since it was measured"):
        gather(prepared)


def test_numbers_wait_for_videos_if_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Catches measuring that ends because the other process is still loading its network."""
    monkeypatch.setattr(work, "POLL_S", 0.001)
    video = tmp_path / "video"
    polls = []

    def sleep(seconds: float) -> None:
        polls.append(seconds)
        if len(polls) == 3 * work.IDLE_POLLS:
            video.write_text("there")

    monkeypatch.setattr(time, "sleep", sleep)
    result = tmp_path / "result"
    make = partial(result.write_text, "measured")
    task = Task("one", result, tmp_path / "lock", make, needs=video)  # type: ignore[arg-type]
    assert run_tasks([task]) == []
    assert not result.exists()
    assert len(polls) == work.IDLE_POLLS
    assert run_tasks([task], wait=True) == []
    assert result.read_text() == "measured"


def test_a_video_that_cannot_be_measured_is_named_and_the_rest_is_done(
    plan: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Catches one damaged video that stops all others, or goes unsaid."""
    monkeypatch.setattr(work, "POLL_S", 0.01)
    clips = plan.parent / "clips"
    prepared = prepare(str(plan))
    assert run_tasks(Worker(prepared, "cpu").tasks("videos", ["data"])) == []
    clips.mkdir()
    for cell in prepared.cells("data"):
        (clips / f"{cell.name}.mp4").write_bytes(prepared.video(cell).read_bytes())
    (clips / "001-1.mp4").write_bytes(b"no video")
    text = plan.read_text()
    kind = f"kind: videos, files: '{clips}/{{number}}-{{seed}}.mp4'"
    plan.write_text(text.replace("kind: student, about: not trained yet, weights:", f"{kind}, x:"))
    plan.write_text(plan.read_text().replace(f", x: {plan.parent}/absent.safetensors", ""))
    assert main(["protocol", str(plan), "--only", "absent"]) == EXIT_USER_ERROR
    said = capsys.readouterr()
    assert "2 results failed, the first: numbers of absent 001-1" in said.err
    assert "absent: 5 of 6 videos are measured so far." in said.out


def test_what_is_wrong_in_a_plan_is_named(plan: Path):
    """Catches a plan that fails after hours, or runs something else than it says."""
    wrong = {
        "teacher: teacher": ("teacher: nobody", "teacher is 'nobody', which is no method"),
        "data: data": ("data: teacher", "teacher and data are one method"),
        "seeds: [1, 2]": ("seeds: [1, 1]", r"seeds are \[1, 1\]"),
        "{kind: teacher": ("{kind: magic", "methods.teacher.kind is 'magic'"),
        "features: [pixels,": ("features: [edges,", "features has 'edges'"),
        "a blue square": ("a red disc", "is there twice"),
        "    two: {TF": ("    three: {TF", "paper.rows has three"),
        "TF: 0.25": ("QQ: 0.25", r"paper.rows.absent has \['QQ'\]"),
        "window_s: 0.25": ("windows: 1", "windows"),
        "{kind: tiny_data,": ("{kind: videos,", "methods.data.files is empty"),
        "steps: 1}": ("steps: 0}", "methods.teacher.steps is 0"),
    }
    text = plan.read_text()
    for was, (now, message) in wrong.items():
        assert was in text
        plan.write_text(text.replace(was, now, 1))
        with pytest.raises(UserError, match=message):
            prepare(str(plan))
    with pytest.raises(UserError, match=r"there is no protocol nothing; use one of .*paper/table1"):
        prepare("nothing")


def test_numbers_say_what_made_them(finished: tuple[Path, str]):
    """Catches a number that nobody can make again."""
    plan, _ = finished
    found = json.loads((plan.parent / "out/evaluation.json").read_text())
    assert found["prompts"]["number"] == 3
    assert len(found["prompts"]["sha256"]) == 64
    assert found["prompts"]["extended"] is False
    assert found["seeds"] == [1, 2]
    one = found["methods"]["one"]
    (made,) = one["made"]
    assert made["weights"] == sha256_of(plan.parent / "one.safetensors")
    assert made["sampler"]["ladder"] == [1000, 750, 500, 250]
    assert made["recipe_stated"] is False
    assert (made["fps"], made["encoder"]["crf"], made["device"]) == (16, 10, "cpu")
    assert made["torch"] == torch.__version__
    assert made["stream"]["window_frames"] == 6
    assert found["methods"]["teacher"]["made"][0]["sampler"]["steps"] == 1
    assert one["encoders"]["pixels"]
    video = one["videos"][3]
    assert (video["prompt"], video["seed"], video["frames"]) == (1, 2, 9)
    assert video["sha256"] == sha256_of(ROOT / video["file"])
    wanted = measure_file(ROOT / video["file"], 16.0, 12, 9).numbers
    assert video["numbers"]["saturation"] == pytest.approx(wanted["saturation"])
    assert video["numbers"]["flow"] == pytest.approx(wanted["flow"])
    assert found["methods"]["absent"]["not_run"].startswith("no weights at")
    assert "made" not in found["methods"]["absent"]


def test_evaluate_repeats_what_made_a_video(finished: tuple[Path, str], tmp_path: Path):
    """Catches a result file of videos that has lost their prompt, seed and weights."""
    videos = finished[0].parent / "out/videos/one"
    out = tmp_path / "e.json"
    assert main(["evaluate", str(videos / "002-2.mp4"), "--out", str(out)]) == 0
    (video,) = json.loads(out.read_text())["videos"]
    assert video["made"]["made"]["prompt"] == "a green cross moves"
    assert video["made"]["made"]["seed"] == 2
    assert video["made"]["made"]["weights"] == sha256_of(finished[0].parent / "one.safetensors")
