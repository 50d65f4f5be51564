"""The commands `clips`, `pack` and `verify` as a user types them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from selfforcing_dfd.cli.main import main
from selfforcing_dfd.common import shipped
from selfforcing_dfd.data.shards import ShardReader
from selfforcing_dfd.data.sources.video import read_video
from selfforcing_dfd.tiny.codec import TinyCodec


def test_clips_to_shards_to_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The README's way from nothing to a data set, with the shipped basis."""
    clips = tmp_path / "clips"
    assert main(["clips", str(clips), "--num", "3", "--seed", "7", "--level", "medium"]) == 0
    assert main(["pack", str(clips), "--codec", "tiny"]) == 0
    assert main(["verify", str(tmp_path / "clips-shards")]) == 0
    assert "3 samples in 1 shards, as packed" in capsys.readouterr().out
    reader = ShardReader(tmp_path / "clips-shards")
    assert reader.index.latent_shape == (9, 16, 8, 8)
    basis = TinyCodec.load(shipped("assets/tiny/codec.safetensors"))
    assert reader.index.fingerprints["codec"] == basis.fingerprint


def test_a_fitted_basis_lies_beside_the_shards_and_decodes_them(
    clips: Path, tmp_path: Path
) -> None:
    """Catches shards that cannot be decoded, and a basis that was fitted and then not used.

    Tolerance: the fitted basis gives 38 dB on this clip, a random orthonormal one 19.
    """
    out = tmp_path / "shards"
    assert (
        main(
            [
                "pack",
                str(clips),
                "--codec",
                "tiny",
                "--fit",
                "--frames",
                "9",
                "--out",
                str(out),
                "--float32",
            ]
        )
        == 0
    )
    reader = ShardReader(out)
    codec = TinyCodec.load(out / "codec.safetensors")
    assert codec.fingerprint == reader.index.fingerprints["codec"]
    video = read_video(clips / "000000.mp4", 9).float() / 255
    error = (codec.decode(reader[0].latents[None])[0] - video).square().mean()
    assert -10 * torch.log10(error) > 30


def test_verify_reports_a_changed_shard(
    own_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a command that prints an error and returns success to the calling script."""
    shard = own_shards / "shard-000001.tar"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert main(["verify", str(own_shards)]) == 2
    assert "error: " in (message := capsys.readouterr().err)
    assert "shard-000001.tar: not as packed" in message


def test_refused_clips_are_printed(
    own_clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a summary that only counts."""
    (own_clips / "000001.txt").unlink()
    main(
        [
            "pack",
            str(own_clips),
            "--codec",
            "tiny",
            "--frames",
            "9",
            "--out",
            str(tmp_path / "shards"),
        ]
    )
    assert "left out 000001.mp4: no caption; write one into 000001.txt" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--basis", "missing.safetensors", "--frames", "9"],
            "missing.safetensors: no codec basis; name one with --basis FILE or",
        ),
        (["--frames", "8"], "8 video frames are not 1 + 4 n; use 5 or 9"),
        (
            ["--fit", "--size", "32x64", "--frames", "9"],
            "none of its 4 clips can be used; the first of them:\n  000000.mp4: is",
        ),
        (["--frames", "13"], "none of its 4 clips can be used"),
    ],
)
def test_mistakes_end_in_one_message_and_a_failure(
    own_clips: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    """Catches a traceback in place of what to do."""
    assert (
        main(
            [
                "pack",
                str(own_clips),
                "--codec",
                "tiny",
                "--out",
                str(tmp_path / "shards"),
                *arguments,
            ]
        )
        == 2
    )
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert message in printed
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize("size", ["64", "64x", "axb", "64x64x3"])
def test_a_malformed_size_is_explained(capsys: pytest.CaptureFixture[str], size: str) -> None:
    """Catches argparse's own words, which name a private function."""
    assert main(["pack", "clips", "--codec", "tiny", "--size", size]) == 2
    assert f"'{size}', want HEIGHTxWIDTH such as 480x832" in capsys.readouterr().err
