"""The pack command with the real classes of Wan's VAE and text encoder at tiny size."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from tiny_text import DIM, save_text_folder

from selfforcing_dfd.cli.main import main
from selfforcing_dfd.codecs.prompts import MAX_LENGTH
from selfforcing_dfd.codecs.text import WanText
from selfforcing_dfd.codecs.wan_vae import WanCodec
from selfforcing_dfd.data.encoders import default_negative_prompt
from selfforcing_dfd.data.shards import ShardReader
from selfforcing_dfd.data.sources.video import read_video


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder laid out as Wan-AI/Wan2.1-T2V-1.3B-Diffusers, without a transformer."""
    folder = save_text_folder(tmp_path_factory.mktemp("wan"))
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=1)
    vae.save_pretrained(folder / "vae")
    return folder


def command(clips: Path, model: Path, out: Path, *more: str) -> list[str]:
    wan = [
        "--codec",
        "wan",
        "--model",
        str(model),
        "--frames",
        "9",
        "--size",
        "32x48",
        "--resize",
        "cover",
    ]
    return ["pack", str(clips), *wan, "--shard-size", "2", "--out", str(out), *more]


@pytest.fixture(scope="session")
def wan_shards(clips: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four clips, in two shards."""
    few = tmp_path_factory.mktemp("few")
    for number in range(4):
        for ending in (".mp4", ".txt"):
            shutil.copyfile(clips / f"{number:06d}{ending}", few / f"{number:06d}{ending}")
    assert (
        main(command(few, model, few.parent / "wan-shards", "--negative-prompt", "red and blue"))
        == 0
    )
    return few.parent / "wan-shards"


def test_latents_and_text_are_those_of_wan(own_clips: Path, model: Path, wan_shards: Path) -> None:
    """Catches pixels outside [0, 1], latents that are not normalised, and padding that is not zero.

    Exact: one clip and one prompt at a time on both sides, rounded to half once.
    """
    reader = ShardReader(wan_shards)
    reader.verify()
    assert reader.index.latent_shape == (3, 16, 4, 6)
    assert reader.index.text_shape == (MAX_LENGTH, DIM)
    codec = WanCodec.from_pretrained(model)
    text = WanText.from_pretrained(model)
    assert reader.index.fingerprints == {"codec": codec.fingerprint, "text": text.fingerprint}
    for number in range(4):
        video = read_video(own_clips / f"00000{number}.mp4", 9, (32, 48), "cover")
        assert reader[number].latents.equal(
            codec.encode(video[None].float() / 255)[0].half().float()
        )
        assert reader[number].text.equal(text.encode([reader.captions[number]])[0].half().float())
        stored = np.load(io.BytesIO(reader.members(number)["text.npy"]))
        assert len(stored) == len(text.tokenizer(reader.captions[number])["input_ids"])
    assert reader.negative is not None
    assert reader.negative.equal(text.encode(["red and blue"])[0].half().float())


def test_the_negative_prompt_of_umt5_is_there_unasked(
    own_clips: Path, model: Path, tmp_path: Path
) -> None:
    """Catches a default of none: training with guidance must never need the text encoder."""
    assert main(command(own_clips, model, tmp_path / "shards")) == 0
    reader = ShardReader(tmp_path / "shards")
    prompt = default_negative_prompt("umt5")
    assert prompt is not None and reader.index.about["negative"]["prompt"] == prompt
    wanted = WanText.from_pretrained(model).encode([prompt])[0].half().float()
    assert reader.negative is not None and reader.negative.equal(wanted)


def test_cache_and_workers_change_no_byte(
    own_clips: Path, model: Path, wan_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a second run that reads the text encoder's 11 GB although the cache has it all."""
    more = (
        "--negative-prompt",
        "red and blue",
        "--text-cache",
        str(tmp_path / "cache"),
        "--workers",
        "3",
    )
    assert main(command(own_clips, model, tmp_path / "first", *more)) == 0

    def unwanted(*arguments: object) -> None:
        raise AssertionError("the text encoder was loaded although every prompt is in the cache")

    monkeypatch.setattr(WanText, "from_pretrained", unwanted)
    assert main(command(own_clips, model, tmp_path / "second", *more)) == 0
    for path in wan_shards.iterdir():
        assert (tmp_path / "first" / path.name).read_bytes() == path.read_bytes()
        assert (tmp_path / "second" / path.name).read_bytes() == path.read_bytes()


def test_the_dtype_of_the_vae_is_part_of_what_was_packed(
    own_clips: Path, model: Path, wan_shards: Path, tmp_path: Path
) -> None:
    """Catches --dtype that reaches the text encoder, or nothing at all.

    Latents computed in bfloat16 are others.
    """
    out = tmp_path / "shards"
    assert (
        main(
            command(
                own_clips, model, out, "--negative-prompt", "red and blue", "--dtype", "bfloat16"
            )
        )
        == 0
    )
    half = ShardReader(out)
    full = ShardReader(wan_shards)
    assert half.index.about["settings"]["codec_dtype"] == "bfloat16"
    assert not half[0].latents.equal(full[0].latents)
    assert half[0].text.equal(full[0].text)


@pytest.mark.parametrize(
    ("codec", "part", "message"),
    [
        (
            "wan",
            None,
            "--codec wan needs --model DIR, a diffusers folder of Wan2.1 with its subfolder vae",
        ),
        ("wan", "vae", "holds no vae/config.json; want a diffusers folder of Wan2.1"),
        ("wan", "text_encoder", "lacks text_encoder/config.json"),
        ("tiny", None, "--text umt5 needs --model DIR"),
    ],
)
def test_missing_parts_of_the_model_are_named(
    own_clips: Path,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    codec: str,
    part: str,
    message: str,
) -> None:
    """Catches a user without the weights who is not told what to fetch, or too late."""
    arguments = [
        "pack",
        str(own_clips),
        "--codec",
        codec,
        "--text",
        "umt5",
        "--frames",
        "9",
        "--size",
        "64x64",
        "--out",
        str(tmp_path / "shards"),
    ]
    if part:
        folder = Path(shutil.copytree(model, tmp_path / "model"))
        shutil.rmtree(folder / part)
        arguments += ["--model", str(folder)]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "shards").exists()
