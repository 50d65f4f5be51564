"""From clips to a stream on a Wan-shaped model of random weights.

The recipes are those for 1.3B with smaller numbers; nothing is replaced. The transformer,
AutoencoderKLWan, UMT5EncoderModel and tokenizer are the real classes in the real file layout.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_files import write_clip
from diffusers import WanTransformer3DModel
from tiny_models import fill_weights
from tiny_text import DIM
from tiny_wan import HEIGHT, WIDTH, save_wan_folder
from y4m import y4m

from selfforcing_dfd import rng
from selfforcing_dfd.cli.main import main
from selfforcing_dfd.cli.train import run
from selfforcing_dfd.config import ConfigError
from selfforcing_dfd.data.shards import ShardReader
from selfforcing_dfd.data.sources.video import read_video
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.stages import load_config
from selfforcing_dfd.streaming.pipeline import CausalWanPipeline
from selfforcing_dfd.weights.read import describe, load_network

HEADS, HEAD_DIM, LAYERS, FFN, FREQ = 8, 32, 3, 512, 64
VIDEO_FRAMES, LATENT_FRAMES, NUM_CLIPS = 21, 6, 4
SMALL = (
    *(
        f"rollout.frames={LATENT_FRAMES}",
        "batch.size=2",
        "batch.micro=2",
        "data.workers=0",
        "checkpoint.every=1",
    ),
    *(f"data.video_size=[{HEIGHT},{WIDTH}]", "run.device=cpu"),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole")


@pytest.fixture(scope="module")
def wan(place: Path) -> Path:
    """As a user has it on disk: Wan2.1's own folder, its transformer bidirectional."""
    folder = save_wan_folder(place / "wan")
    sizes: dict[str, Any] = {
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "num_layers": LAYERS,
    }
    teacher = WanTransformer3DModel(
        **sizes, ffn_dim=FFN, freq_dim=FREQ, text_dim=DIM, in_channels=16, out_channels=16
    )
    fill_weights(teacher, 7)
    teacher.save_pretrained(folder / "transformer")
    assert sum(parameter.numel() for parameter in teacher.parameters()) > 2e6
    return folder


@pytest.fixture(scope="module")
def shards(place: Path, wan: Path) -> Path:
    """`pack` on clips with captions, as on a user's own videos."""
    clips = place / "clips"
    clips.mkdir()
    for number in range(NUM_CLIPS):
        colours = (
            rng.uniform((VIDEO_FRAMES, 4, 6, 3), number, "clip")
            .repeat_interleave(8, 1)
            .repeat_interleave(8, 2)
        )
        write_clip(clips / f"clip{number}.mp4", (colours * 255).to(torch.uint8), 16)
        (clips / f"clip{number}.txt").write_text(f"colours number {number // 2}")
    size = ("--frames", str(VIDEO_FRAMES), "--size", f"{HEIGHT}x{WIDTH}")
    cache = ("--text-cache", str(place / "texts"))
    out = place / "shards"
    assert (
        main(
            [
                "pack",
                str(clips),
                "--codec",
                "wan",
                "--model",
                str(wan),
                *size,
                *cache,
                "--out",
                str(out),
            ]
        )
        == 0
    )
    return out


@pytest.fixture(scope="module")
def prompts(place: Path, wan: Path) -> Path:
    """`prompts` on a text file: all the data that trajectories and DMD need."""
    (place / "prompts.txt").write_text("colours number 0\ncolours that move\na red fox\nwaves\n")
    size, out = ("--frames", str(VIDEO_FRAMES), "--size", f"{HEIGHT}x{WIDTH}"), place / "prompts"
    assert (
        main(["prompts", str(place / "prompts.txt"), "--model", str(wan), *size, "--out", str(out)])
        == 0
    )
    return out


def train(name: str, place: Path, shards: Path, *overrides: str) -> Path:
    """A recipe of configs/wan1.3b at small size; the run's folder."""
    config = load_config(
        f"wan1.3b/{name}.yaml",
        [*SMALL, f"run.out={place / 'runs'}", f"data.shards={shards}", *overrides],
    )
    run(config)
    return place / "runs" / config.run.name


@pytest.fixture(scope="module")
def student(place: Path, wan: Path, shards: Path, prompts: Path) -> Path:
    """Pairs, causal student, DMD on prompts, DFD with its control; the folder of the DFD arm."""
    pairs, teacher = place / "pairs", wan / "transformer"
    train(
        "ode_pairs",
        place,
        prompts,
        f"weights.teacher={teacher}",
        f"pairs.out={pairs}",
        "pairs.steps=2",
        "pairs.num=4",
    )
    init = train("init_ode", place, pairs, f"weights.student={teacher}", "run.student_updates=1")
    start = f"weights.student={init / 'student.safetensors'}"
    teachers = (
        f"weights.teacher={teacher}",
        "score.fake_per_student=1",
        "run.student_updates=1",
        "ema.start=0",
    )
    dmd = train("dmd_ar", place, prompts, start, f"weights.fake={teacher}", *teachers)
    weights = (
        f"weights.student={dmd / 'student.safetensors'}",
        f"weights.fake={dmd / 'fake.safetensors'}",
    )
    causal = train("init_tf", place, shards, f"weights.student={teacher}", "run.student_updates=1")
    arms = (
        f"weights.causal={causal / 'student.safetensors'}",
        "arms.stable=[dfd.preset=stable]",
        "dfd.p=1.0",
        "dfd.p_start=1.0",
    )
    return train("dfd_ar", place, shards, *weights, *teachers, *arms) / "caption"


def test_the_stable_student_is_its_causal_teacher_in_few_steps(place, student):
    """Catches a preset that starts from the DMD student, and a recipe without its noise."""
    run = place / "runs" / "wan1.3b" / "dfd_ar" / "stable"
    settings = load_config(str(run / "config.yaml"))
    assert settings.weights.student == ""
    trained = describe(run / "student.safetensors")
    assert trained.role == "causal_student"
    assert trained.recipe is not None
    assert trained.recipe.keeps_noise
    others = describe(student / "student.safetensors").recipe
    assert others is not None
    assert not others.keeps_noise


@pytest.fixture(scope="module")
def exported(place: Path, wan: Path, student: Path) -> Path:
    out = place / "export"
    assert main(["export", str(student), str(out), "--model", str(wan), "--dtype", "float32"]) == 0
    return out


def test_packed_clips_hold_text_and_the_negative_prompt(shards):
    """Catches data without stored text, and a negative prompt of zeros.

    Training would need the text encoder.
    """
    reader = ShardReader(shards)
    assert len(reader) == NUM_CLIPS
    assert reader.index.latent_shape == (LATENT_FRAMES, 16, HEIGHT // 8, WIDTH // 8)
    assert reader.negative is not None
    assert reader.negative.abs().sum() > 0


def test_every_stage_changed_the_student(place, wan, student):
    """Catches a stage that loads nothing, trains nothing, or writes what it started from."""
    runs = place / "runs" / "wan1.3b"
    control = runs / "dfd_ar" / "control"
    files = [
        wan / "transformer",
        *(folder / "student.safetensors" for folder in (runs / "init_ode", runs / "dmd_ar")),
    ]
    states = [
        load_network(path).state_dict()
        for path in (*files, control / "student.safetensors", student / "student.safetensors")
    ]
    for one, other in zip(states, [*states[1:], states[0]], strict=True):
        assert any(not torch.equal(value, other[name]) for name, value in one.items())
        assert all(bool(value.isfinite().all()) for value in one.values())


def test_an_export_is_read_by_diffusers(exported, student):
    """Catches names or a config that only this package understands; bit for bit."""
    theirs: Any = WanTransformer3DModel.from_pretrained(exported / "transformer")
    ours = WanTransformer.from_pretrained(exported / "transformer")
    trained = load_network(student / "student.safetensors").state_dict()
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name])
        assert torch.equal(value, trained[name])


def test_an_export_streams(place, exported, capsys):
    """Catches an export that the command line cannot run.

    Its video is the one that the pipeline makes.
    """
    out = place / "stream.y4m"
    size = ("--size", f"{HEIGHT}x{WIDTH}")
    options = (
        "--chunks",
        "2",
        "--window",
        "6",
        "--sink",
        "0",
        "--positions",
        "absolute",
        "--seed",
        "3",
        "--device",
        "cpu",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        assert (
            main(
                [
                    "stream",
                    "--model",
                    str(exported),
                    "--prompt",
                    "colours",
                    "--out",
                    str(out),
                    *size,
                    *options,
                ]
            )
            == 0
        )
    pipeline = CausalWanPipeline.from_pretrained(exported)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        "colours", num_frames=VIDEO_FRAMES, height=HEIGHT, width=WIDTH, seed=3, output_type="uint8"
    ).frames[0]
    assert out.read_bytes() == y4m(torch.as_tensor(made))


def test_the_card_says_how_it_was_made(exported):
    """Catches an export without its recipe, and one that names a folder of its author's machine."""
    card = (exported / "README.md").read_text()
    config = json.loads((exported / "transformer" / "config.json").read_text())
    assert config["role"] == "causal_student"
    assert config["recipe"]["frames"] == LATENT_FRAMES
    assert f"Trained for {WIDTH} x {HEIGHT} pixels" in card
    assert "dfd" in card
    assert str(exported.parent) not in card


def test_clips_are_what_was_packed(place, shards):
    """Catches latents of other frames than the clip's first ones.

    The VAE's decode is nearer to its own clip than to others.
    """
    from selfforcing_dfd.codecs.wan_vae import WanCodec

    codec, reader = WanCodec.from_pretrained(place / "wan"), ShardReader(shards)
    clips = [
        read_video(place / "clips" / f"clip{n}.mp4", VIDEO_FRAMES, (HEIGHT, WIDTH)).float() / 255
        for n in range(NUM_CLIPS)
    ]
    for number in range(NUM_CLIPS):
        again = codec.encode(clips[number][None])[0]
        # stored in float16
        assert (reader[number].latents - again).abs().max() < 2e-3 * again.abs().max()


def test_what_needs_clips_refuses_prompts(place, wan, prompts):
    """Catches data forcing with clips of zeros: every video would be pulled to grey."""
    teacher = wan / "transformer"
    weights = [f"weights.{role}={teacher}" for role in ("student", "teacher", "fake")]
    with pytest.raises(
        ConfigError, match="holds prompts without clips, which do for dmd and dp_dmd and pairs"
    ):
        train("dfd_ar", place, prompts, *weights, "run.name=refused")
    clip = ["run.name=refused", "regression.target=clip"]
    for setting, told in (
        ("score.regression_per_student=6", "regression_per_student is 6"),
        ("score.control_variate=true", "control_variate is on"),
    ):
        with pytest.raises(ConfigError, match=f"{told}, but .* holds prompts without clips"):
            train("dmd_ar", place, prompts, *weights, *clip, setting)
    assert not (place / "runs" / "refused").exists()


def test_prompts_alone_tell_of_no_data(place, student):
    """Catches a gap to clips that do not exist, and guards that compare with them."""
    rows = [
        json.loads(line)
        for line in (place / "runs/wan1.3b/dmd_ar/metrics.jsonl").read_text().splitlines()
    ]
    (row,) = [row for row in rows if row["kind"] == "student"]
    assert "loss" in row
    assert not any("gap" in key or "contrast" in key for key in row)
