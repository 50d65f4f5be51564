"""240 tiny mp4s, with others that are damaged, by commands alone: from intake to report.

One test, so that one process makes it: about 20 core seconds.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import av
import pytest
import torch
from clip_files import write_clip

from selfforcing_dfd.cli.main import main
from selfforcing_dfd.curate.assemble import RECORD
from selfforcing_dfd.data.shards import ShardReader
from selfforcing_dfd.data.sources.video import read_video
from selfforcing_dfd.tiny import world
from selfforcing_dfd.weights.read import load_network

NUM_CLIPS = 240
FRAMES = 21
LATENT_FRAMES = 6
NUM_CLUSTERS = 12
QUOTA = 100
PROMPT = "a small red square moves right slowly"
START = "assets/tiny/student.safetensors"
OTHERS = {"from_phone.mov": ("mov", "libx264", 300), "from_web.webm": ("webm", "libvpx", 301)}
CONFIG = f"""
run: {{name: dfd, stage: dfd, student_updates: 1, device: cpu}}
weights:
  student: {START}
  teacher: assets/tiny/teacher.safetensors
  fake: assets/tiny/fake.safetensors
rollout: {{frames: {LATENT_FRAMES}}}
dfd: {{p: 1.0, p_start: 1.0, pairing: caption}}
score: {{fake_per_student: 1}}
batch: {{size: 2, micro: 2}}
ema: {{start: 0}}
data: {{captions: short}}
checkpoint: {{every: 1}}
report: {{clips: 4, teacher_steps: 1, follow_clips: 0}}
"""


def test_clips_become_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches steps that lose clips, or that do not find what the one before has made."""
    films = tmp_path / "films"
    harmed = films_with_others(films)
    good = [f"{number:06d}.mp4" for number in range(NUM_CLIPS)]
    good += OTHERS
    curation = see(films, good, harmed, capsys)
    shards = tmp_path / "shards"
    packed(curation, shards, good, capsys)
    student = trained(tmp_path, shards)
    streamed(tmp_path, student, capsys)
    reported(student.parent)


def run(*words: object) -> None:
    assert main(list(map(str, words))) == 0


def films_with_others(films: Path) -> dict[str, str]:
    """Clips with motion of each kind, two of other containers, and files that cannot be used.

    Returns those by name, with what must be said of each.
    """
    world.write_clips(films, NUM_CLIPS, 7, num_frames=FRAMES)
    for name, (form, codec, number) in OTHERS.items():
        video = world.render(world.clip_number(number, 7, "long")[0], FRAMES)[0]
        with av.open(str(films / name), "w", format=form) as container:
            stream = container.add_stream(codec, rate=world.FPS, options={"crf": "6"})
            stream.height, stream.width = video.shape[1:3]
            stream.bit_rate = 2_000_000
            for picture in (255 * video).round().byte().numpy():
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    whole = (films / "000000.mp4").read_bytes()
    (films / "bad_cut.mp4").write_bytes(whole[: len(whole) // 2])
    (films / "bad_empty.mp4").write_bytes(b"")
    (films / "bad_text.mp4").write_text("no video")
    write_clip(films / "bad_short.mp4", read_video(films / "000000.mp4", FRAMES - 1))
    (films / "notes.pdf").write_text("no video, and it does not say so")
    unread = "cannot be read as video"
    short = f"has {FRAMES - 1} video frames, want {FRAMES}"
    reasons = {"bad_cut.mp4": unread, "bad_empty.mp4": unread, "bad_short.mp4": short}
    return reasons | {"bad_text.mp4": unread}


def see(
    films: Path, good: list[str], harmed: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> Path:
    """Captions, vectors, clusters and picks; what cannot be seen is left out of each by name."""
    offered = len(good) + len(harmed)
    frames = ("--frames", FRAMES)
    run("curate", "caption", films, "--model", "tiny", *frames, "--workers", 1)
    account = f"{offered} offered = {len(good)} captioned + {len(harmed)} left out"
    account_is(account, harmed, capsys)
    run("curate", "embed", films, *frames, "--processes", 1)
    account_is(account.replace("captioned", "embedded"), harmed, capsys)
    table = [json.loads(line) for line in captions_of(films).read_text().splitlines()]
    assert sorted(row["video"] for row in table if "problem" not in row) == sorted(good)
    curation = films.with_name("films-curation")
    lines = [json.loads(line) for line in (curation / "clips.jsonl").read_text().splitlines()]
    assert {row["video"] for row in lines if "problem" in row} == set(harmed)
    run("curate", "cluster", curation, "--clusters", NUM_CLUSTERS)
    sizes = json.loads((curation / "clusters.json").read_text())["sizes"]
    assert len(sizes) == NUM_CLUSTERS
    assert sum(sizes) == len(good)
    run("curate", "pick", curation, "--candidates", 8, "--auto", 4, "--processes", 1)
    assert len(list((curation / "sheets").glob("*.jpg"))) == NUM_CLUSTERS
    return curation


def account_is(text: str, reasons: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """A step said how many clips became what, and named those that it left out."""
    said = capsys.readouterr().out
    assert text in said
    for name, reason in reasons.items():
        assert f"left out {name}: {reason}" in said


def captions_of(films: Path) -> Path:
    return films.with_name(f"{films.name}-captions.jsonl")


def packed(
    curation: Path, shards: Path, good: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The set in shards; of its clips one rots and one is cut short after they were picked."""
    films = curation.with_name("films")
    prompts = curation.with_name("prompts.txt")
    prompts.write_text(PROMPT + "\n")
    command = ("curate", "pack", curation, "--codec", "tiny", "--captions", captions_of(films))
    options = ("--prompts", prompts, "--quota", QUOTA)
    run(*command, *options, "--out", shards.with_name("whole"))
    record = json.loads((shards.with_name("whole") / RECORD).read_text())
    chosen = [one["clip"] for one in record["chosen"]]
    rotten = chosen[3]
    short = chosen[5]
    data = bytearray((films / rotten).read_bytes())
    data[len(data) // 2 : len(data) // 2 + 64] = bytes(64)
    (films / rotten).write_bytes(data)
    write_clip(films / short, read_video(films / "000000.mp4", 5))
    capsys.readouterr()
    run(*command, *options, "--out", shards)
    said = capsys.readouterr().out
    assert f"{QUOTA} offered = {QUOTA - 2} packed + 1 refused + 1 damaged" in said
    assert "skipped 1 files that are no videos by their endings: notes.pdf" in said
    reader = ShardReader(shards, "short")
    left_out = {one["file"]: one.get("damaged", False) for one in reader.index.refused}
    assert left_out == {rotten: True, short: False}
    keys = [entry.key for entry in reader.index.samples]
    assert keys == [name.rpartition(".")[0] for name in chosen if name not in left_out]
    assert set(chosen) <= set(good)
    nothing_leaked(reader, films, said)


def nothing_leaked(reader: ShardReader, films: Path, said: str) -> None:
    """No clip of the evaluation's prompt is in the set, and so many were there."""
    rows = [json.loads(line) for line in captions_of(films).read_text().splitlines()]
    leaking = sum(row["long"] == PROMPT for row in rows)
    assert leaking >= 2
    assert f"{leaking} clips may not be in the set: equal to an evaluation prompt" in said
    packed = [caption for entry in reader.index.samples for caption in entry.captions.values()]
    assert PROMPT not in packed


def trained(place: Path, shards: Path) -> Path:
    """One update of data forcing on the set; the student is another one than before."""
    (place / "dfd.yaml").write_text(CONFIG)
    run("train", "--config", place / "dfd.yaml", f"run.out={place}", f"data.shards={shards}")
    lines = (place / "dfd" / "metrics.jsonl").read_text().splitlines()
    (row,) = [row for row in map(json.loads, lines) if row["kind"] == "student"]
    assert row["dfd"] == 1, "the update asked the teacher about real clips"
    student = place / "dfd" / "student.safetensors"
    before = load_network(Path(__file__).parents[1] / START).state_dict()
    after = load_network(student).state_dict()
    assert all(bool(value.isfinite().all()) for value in after.values())
    changed = [name for name, value in before.items() if not torch.equal(value, after[name])]
    assert len(changed) > len(before) / 2
    return student


def streamed(place: Path, student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three chunks of the student as a video that moves, and its numbers."""
    stream = place / "stream.mp4"
    options = ("--chunks", 3, "--device", "cpu")
    run("stream", "--weights", student, "--prompt", PROMPT, *options, "--out", stream)
    video = read_video(stream, 33, (world.SIDE, world.SIDE)).float()
    assert (video[1:] - video[:-1]).abs().mean() > 0.1
    capsys.readouterr()
    run("evaluate", stream, "--out", place / "evaluation.json")
    content = json.loads((place / "evaluation.json").read_text())
    (measured,) = content["videos"]
    assert measured["frames"] == 33
    assert all(math.isfinite(measured["numbers"][name]) for name in ("contrast", "flow"))
    assert f"{measured['numbers']['contrast']:.3f}" in capsys.readouterr().out


def reported(folder: Path) -> None:
    """The report's page and table hold the numbers of its file, of data and of both students."""
    report = json.loads((folder / "report.json").read_text())
    rows = {row["name"]: row["scores"] for row in report["rows"]}
    assert {"data", "start", "student"} <= rows.keys()
    for name in ("report.md", "report.html"):
        text = (folder / name).read_text()
        for scores in (rows["data"], rows["start"], rows["student"]):
            assert f"{scores['spread']['value']:.3f}" in text
    assert rows["student"]["spread"]["value"] > 0
    assert list((folder / "samples").glob("*.mp4"))
