"""Wan2.1-I2V at tiny size: clips, their pictures, three stages of training, a stream.

Transformer, VAE, CLIP, UMT5 and tokenizer are the real classes in the real file layout. Their
weights are random.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_files import write_clip
from tiny_pictures import IMAGE_DIM, save_picture_folder
from tiny_wan import HEIGHT, WIDTH

from selfforcing_dfd import rng
from selfforcing_dfd.cli.main import main
from selfforcing_dfd.cli.train import run
from selfforcing_dfd.codecs.pictures import PictureEncoder
from selfforcing_dfd.codecs.wan_vae import WanCodec
from selfforcing_dfd.common import UserError
from selfforcing_dfd.config import ConfigError
from selfforcing_dfd.context import KVCache
from selfforcing_dfd.data.format import PICTURE, PICTURE_TOKENS
from selfforcing_dfd.data.order import SampleOrder, load_batch
from selfforcing_dfd.data.shards import ShardReader
from selfforcing_dfd.models.picture import PictureConditioning
from selfforcing_dfd.rollout import plan_chunks, rollout
from selfforcing_dfd.stages import load_config
from selfforcing_dfd.streaming.live_bytes import peak_bytes
from selfforcing_dfd.streaming.load import LoadError, load_stream_model
from selfforcing_dfd.streaming.load_wan import load_wan_model
from selfforcing_dfd.streaming.memory import memory_needs
from selfforcing_dfd.streaming.saving import Saving
from selfforcing_dfd.streaming.session import StreamModel, StreamSession, StreamSettings
from selfforcing_dfd.streaming.wan_memory import streamed_wan
from selfforcing_dfd.weights.read import describe, load_network

VIDEO_FRAMES = 13
LATENT_FRAMES = 4
CHUNK = 2
SMALL = (
    f"rollout.frames={LATENT_FRAMES}",
    f"rollout.chunk_frames={CHUNK}",
    "rollout.ladder=[1000,500]",
    "batch.size=1",
    "batch.micro=1",
    "data.workers=0",
    "checkpoint.every=1",
    "run.student_updates=1",
    "run.device=cpu",
    "run.gpus=1",
    "model.sequence_ranks=1",
    "model.compute=float32",
    f"data.video_size=[{HEIGHT},{WIDTH}]",
)
WHOLE = StreamSettings(sink_frames=0, window_frames=LATENT_FRAMES, positions="absolute")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("picture")


@pytest.fixture(scope="module")
def wan(place: Path) -> Path:
    return save_picture_folder(place / "wan")


@pytest.fixture(scope="module")
def bare(place: Path, wan: Path) -> Path:
    """Packed clips without pictures."""
    clips = place / "clips"
    clips.mkdir()
    for number in range(2):
        small = rng.uniform((VIDEO_FRAMES, 4, 6, 3), number, "clip")
        video = small.repeat_interleave(8, 1).repeat_interleave(8, 2)
        write_clip(clips / f"clip{number}.mp4", (video * 255).to(torch.uint8), 16)
        (clips / f"clip{number}.txt").write_text("a red disc")
    size = ["--frames", str(VIDEO_FRAMES), "--size", f"{HEIGHT}x{WIDTH}"]
    out = place / "shards"
    command = ["pack", str(clips), "--codec", "wan", "--model", str(wan), *size, "--out", str(out)]
    assert main(command) == 0
    return out


@pytest.fixture(scope="module")
def shards(place: Path, wan: Path, bare: Path) -> Path:
    """The same clips with the pictures of the command `images`."""
    before = ShardReader(bare)
    members = [before.members(number) for number in range(len(before))]
    teacher = wan / "transformer"
    weights = [f"weights.{role}={teacher}" for role in ("student", "teacher", "fake")]
    with pytest.raises(ConfigError, match=r"holds none; add them .*`selfforcing-dfd images"):
        train("dmd_i2v", place, bare, *weights, "run.name=refused")
    assert main(["images", str(bare), "--model", str(wan), "--device", "cpu"]) == 0
    after = ShardReader(bare)
    for number, stored in enumerate(members):
        found = after.members(number)
        assert set(found) - set(stored) == {PICTURE, PICTURE_TOKENS}
        assert all(found[name] == stored[name] for name in stored)
    return bare


def train(name: str, place: Path, shards: Path, *overrides: str) -> Path:
    """A recipe of configs/wan14b at small size; the run's folder."""
    settings = [*SMALL, f"run.out={place / 'runs'}", f"data.shards={shards}", *overrides]
    config = load_config(f"wan14b/{name}.yaml", settings)
    run(config)
    return place / "runs" / config.run.name


@pytest.fixture(scope="module")
def student(place: Path, wan: Path, shards: Path) -> Path:
    """DMD of a student that starts from Wan2.1-I2V itself; the run's folder."""
    weights = [f"weights.{role}={wan / 'transformer'}" for role in ("student", "teacher", "fake")]
    return train("dmd_i2v", place, shards, *weights, "score.fake_per_student=1", "ema.start=0")


@pytest.fixture(scope="module")
def model(wan: Path, student: Path) -> StreamModel:
    path = student / "student.safetensors"
    return load_wan_model(wan, str(path), "cpu", size=(HEIGHT, WIDTH))


def test_a_batch_asks_for_its_own_pictures(shards):
    """Catches pictures of other clips, and the mask stored twice or not at all."""
    reader = ShardReader(shards)
    batch = load_batch(reader, SampleOrder(len(reader), 0), 0, 2)
    asked = batch.conditioning
    assert isinstance(asked, PictureConditioning)
    assert asked.picture is not None
    channels = asked.picture.channels
    assert channels.shape == (2, LATENT_FRAMES, 20, HEIGHT // 8, WIDTH // 8)
    assert torch.equal(channels[:, 0, 4:], batch.latents[:, 0])
    assert bool((channels[:, 0, :4] == 1).all())
    assert asked.picture.tokens.shape[-1] == IMAGE_DIM
    assert "clip-" in reader.index.fingerprints["pictures"]


PARTS = ("image_embedder.ff.net.2.weight", "attn2.add_k_proj.weight", "patch_embedding.weight")


def check_moved(before: Path, after: Path) -> None:
    """All parts for a picture have learnt."""
    old = load_network(before).state_dict()
    new = load_network(after).state_dict()
    moved = [name for name, value in old.items() if not torch.equal(value, new[name])]
    for part in PARTS:
        assert any(name.endswith(part) for name in moved), part


def test_dmd_trains_all_of_student_and_fake_score(wan, student):
    """Catches a stage that asks without the picture, and a file that lost the parts for it."""
    for role in ("student", "fake"):
        check_moved(wan / "transformer", student / f"{role}.safetensors")
    recipe = describe(student / "student.safetensors").recipe
    assert recipe is not None
    assert recipe.given == 0


@pytest.mark.soak
def test_the_causal_start_and_data_forcing_train_in_half_precision(place, wan, shards, student):
    """Catches a recipe of the chain that does not run, and a picture in another dtype."""
    teacher = wan / "transformer"
    half = "model.compute=bfloat16"
    init = train("init_i2v", place, shards, f"weights.student={teacher}", half)
    check_moved(teacher, init / "student.safetensors")
    weights = [f"weights.{r}={student / f'{r}.safetensors'}" for r in ("student", "fake")]
    weights += [f"weights.teacher={teacher}", "score.fake_per_student=1", "ema.start=0"]
    one_arm = "arms={noised_real: [dfd.pairing=noised_real, dfd.p=1.0, dfd.p_start=1.0]}"
    data_forced = train("dfd_i2v", place, shards, *weights, one_arm, half) / "noised_real"
    check_moved(student / "student.safetensors", data_forced / "student.safetensors")


class Watched(StreamSession):
    """A session that keeps its clean latents."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.latents: list[torch.Tensor] = []
        super().__init__(*arguments, **options)

    def _decode(self, x0: torch.Tensor) -> Any:
        self.latents.append(x0)
        return super()._decode(x0)


def shown(name: str = "shown", num_frames: int = 1) -> torch.Tensor:
    return rng.uniform((num_frames, HEIGHT, WIDTH, 3), 0, name).float()


def test_a_stream_is_the_rollout_of_training(model):
    """Catches a stream whose chunks see other channels than in training, or no picture.

    Tolerance: float32, and attention over a ring of slots.
    """
    session = Watched(model, "a red disc", WHOLE, shown())
    frames = torch.cat([session.next_chunk().frames for _ in range(2)])
    assert len(frames) == VIDEO_FRAMES
    assert len(session.context_frames) == 0
    text = model.text.encode(["a red disc"])
    assert model.see is not None
    asked = PictureConditioning(text, model.see(shown()))
    shape = (1, CHUNK, 16, HEIGHT // 8, WIDTH // 8)
    steps = range(1 if model.keeps_noise else len(model.ladder))
    noise = torch.cat(
        [
            torch.stack([rng.normal(shape, 0, "stream noise", chunk, step) for step in steps])
            for chunk in range(2)
        ],
        dim=2,
    )
    chunks = plan_chunks(LATENT_FRAMES, CHUNK)
    wanted = rollout(model.student, noise, asked, KVCache(), model.ladder, chunks).x0
    torch.testing.assert_close(torch.cat(session.latents, 1), wanted, atol=1e-4, rtol=1e-4)


def test_compiled_blocks_see_the_picture(wan, student, model):
    """Catches a program for streams that attends to the text alone."""
    torch._dynamo.reset()
    path = student / "student.safetensors"
    compiled = load_wan_model(wan, str(path), "cpu", size=(HEIGHT, WIDTH))
    compiled.student.compile_blocks(backend="eager")
    sessions = [Watched(each, "a red disc", WHOLE, shown()) for each in (model, compiled)]
    for _ in range(2):
        for session in sessions:
            session.next_chunk()
        plain, other = (session.latents[-1] for session in sessions)
        torch.testing.assert_close(other, plain, atol=1e-4, rtol=1e-4)


def test_another_picture_makes_another_stream(model):
    """Catches a reset that keeps the first picture, and one that forgets it without another."""
    session = Watched(model, "a red disc", WHOLE, shown())
    session.next_chunk()
    first = session.latents[-1]
    session.reset(context=shown("other"))
    session.next_chunk()
    other = session.latents[-1]
    assert (first - other).abs().max() > 1e-3
    session.reset()
    session.next_chunk()
    assert torch.equal(session.latents[-1], other)
    session.set_prompt("a blue square")
    state = session.snapshot()
    session.next_chunk()
    later = session.latents[-1]
    session.reset(context=shown())
    session.restore(state)
    session.next_chunk()
    assert torch.equal(session.latents[-1], later)


def test_a_clip_is_continued_with_its_first_frame_as_picture(model):
    """Catches a clip of which only the first frame is taken."""
    session = StreamSession(model, "a red disc", WHOLE, shown("clip", 5))
    assert len(session.context_frames) == 5
    assert session.next_frame == 2
    assert len(session.next_chunk().frames) == 8


def test_a_stream_outlasts_its_training_clips(model):
    """Catches channels that end with the clips that the student was trained on."""
    short = StreamSettings(sink_frames=0, window_frames=4)
    session = StreamSession(model, "a red disc", short, shown())
    frames = [len(session.next_chunk().frames) for _ in range(4)]
    assert frames == [5, 8, 8, 8]


def test_the_command_takes_a_picture(place, wan, student, capsys):
    """Catches a command line that knows given frames alone."""
    out = place / "stream.y4m"
    picture = place / "first.png"
    write_png(picture)
    options = ["--model", str(wan), "--weights", str(student / "student.safetensors")]
    options += ["--prompt", "a red disc", "--size", f"{HEIGHT}x{WIDTH}", "--device", "cpu"]
    options += ["--chunks", "1", "--sink", "0", "--window", "4", "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        assert main(["stream", *options]) == 2
        assert "by --image or a clip" in capsys.readouterr().err
        assert main(["stream", *options, "--image", str(picture)]) == 0
    assert out.read_bytes().count(b"FRAME") == 5


def test_what_sees_the_picture_is_counted(wan, student, model, capsys):
    """Catches a dry run without the image encoder, 2.5 GB of it at Wan's size, and its moment.

    The VAE's encoder runs on the CPU with all that it makes counted.
    """
    weights = str(student / "student.safetensors")
    streamed, _ = streamed_wan(wan, weights, torch.float32, (HEIGHT, WIDTH), {})
    needs = memory_needs(streamed, WHOLE, Saving())
    encoder = model.see.func.__self__
    counted = sum(part.nbytes for part in encoder.encoder.parameters())
    assert needs.lasting["image encoder"] == counted
    picture = shown()
    as_on_a_gpu = WanCodec(copy.deepcopy(encoder.codec.vae), channels_last=True)
    seeing = PictureEncoder(as_on_a_gpu, None, encoder.encoder)
    taken = peak_bytes(lambda: seeing.latents(picture, LATENT_FRAMES))
    assert needs.moments["a picture is encoded"] == taken
    elsewhere = memory_needs(dataclasses.replace(streamed, codec=None), WHOLE, Saving())
    assert "image encoder" not in elsewhere.lasting
    asked = ["--model", str(wan), "--weights", weights, "--size", f"{HEIGHT}x{WIDTH}"]
    assert main(["stream", *asked, "--dry-run", "--sink", "0", "--window", "4"]) == 0
    assert "image encoder" in capsys.readouterr().out


def write_png(path: Path) -> None:
    from PIL import Image

    Image.fromarray((255 * shown()[0]).to(torch.uint8).numpy()).save(path)


def test_what_a_student_for_pictures_lacks_is_told(place, wan, student):
    """Catches a random image encoder, a tiny world without one, and a page without a picture."""
    weights = student / "student.safetensors"
    for part in ("image_encoder", "image_processor"):
        (wan / part).rename(place / part)
    try:
        with pytest.raises(UserError, match=r"has no image_encoder/config.json.*hf download"):
            load_wan_model(wan, str(weights), "cpu", size=(HEIGHT, WIDTH))
    finally:
        for part in ("image_encoder", "image_processor"):
            (place / part).rename(wan / part)
    with pytest.raises(LoadError, match="which the tiny world does not have"):
        load_stream_model(checkpoint=str(weights), device="cpu")


def test_a_given_frame_and_a_picture_exclude_each_other(place, wan, shards):
    """Catches a first frame that is both clean at sigma 0 and asked for by further channels."""
    teacher = wan / "transformer"
    weights = [f"weights.{role}={teacher}" for role in ("student", "teacher", "fake")]
    with pytest.raises(ConfigError, match=r"rollout.given is 1, .* use rollout.given=0"):
        train("dmd_i2v", place, shards, *weights, "rollout.given=1", "run.name=refused")


def test_a_report_shows_clips_of_their_pictures(place, wan, shards, student):
    """Catches a report that asks without pictures, for a causal student and for its teacher."""
    from selfforcing_dfd.evaluation.generate import FewSteps, causal_clips, teacher_clips
    from selfforcing_dfd.evaluation.video_world import VideoWorld

    config = load_config(str(student / "config.yaml"))
    evaluation = dataclasses.replace(VideoWorld().draw(config, 2), batch=2)
    assert evaluation.picture is not None
    network = load_network(student / "student.safetensors")
    teacher = load_network(wan / "transformer")
    chunks = plan_chunks(LATENT_FRAMES, CHUNK)
    steps = FewSteps((1.0, 0.75), keeps_noise=True)
    made = causal_clips(network, evaluation, lambda x: x, make_chunk=steps, chunks=chunks)
    assert torch.cat(list(made)).shape == (2, *evaluation.latent_shape)
    ode = {"num_steps": 1, "shift": 5.0, "guidance": 3.0}
    both = torch.cat(list(teacher_clips(teacher, evaluation, lambda x: x, **ode)))
    one_by_one = dataclasses.replace(evaluation, batch=1)
    alone = torch.cat(list(teacher_clips(teacher, one_by_one, lambda x: x, **ode)))
    torch.testing.assert_close(alone, both, atol=1e-4, rtol=1e-4)
