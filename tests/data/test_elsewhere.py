"""Packing in several processes gives the bytes of one."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from clip_files import write_clip
from tiny_pack import contents, pack_tiny
from torch import Tensor

from selfforcing_dfd.common import UserError
from selfforcing_dfd.data.elsewhere import Elsewhere
from selfforcing_dfd.data.encoders import tiny_codec_of
from selfforcing_dfd.data.pack import PackOptions, pack
from selfforcing_dfd.data.sources.files import FileSource
from selfforcing_dfd.metrics.scenes import scene_finder
from selfforcing_dfd.processes.engine import HERE, in_processes
from selfforcing_dfd.tiny.codec import TinyCodec
from selfforcing_dfd.tiny.text import TinyText
from selfforcing_dfd.tiny.world import clip_number, render, write_clips

SHIPPED = Path(__file__).parents[2] / "assets" / "tiny" / "codec.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four clips; one is no video and one has no caption."""
    folder = tmp_path_factory.mktemp("elsewhere")
    write_clips(folder, 4, 0, "short", 9)
    (folder / "000001.mp4").write_bytes(b"no video")
    (folder / "000002.txt").unlink()
    return folder


def elsewhere_of(number: int, codec: TinyCodec) -> Elsewhere:
    bases = (codec.first.numpy(), codec.rest.numpy(), codec.scale)
    return Elsewhere(in_processes(number, "fork"), partial(tiny_codec_of, *bases))


def test_processes_change_no_byte(folder: Path, tmp_path: Path, codec: TinyCodec) -> None:
    """Catches items in the order in which they end, and refusals that are lost on the way."""
    here = pack_tiny(folder, tmp_path / "here", codec)
    assert [refusal.file for refusal in here.refused] == ["000001.mp4", "000002.mp4"]
    for number in (1, 2):
        out = tmp_path / str(number)
        elsewhere = elsewhere_of(number, codec)
        assert pack_tiny(folder, out, codec, elsewhere=elsewhere).account == here.account
        assert contents(out) == contents(tmp_path / "here")


def test_windows_are_read_in_processes(tmp_path: Path, codec: TinyCodec) -> None:
    """Catches a reader of long videos that cannot be sent, and windows of another place."""
    films = tmp_path / "films"
    films.mkdir()
    parts = [render(clip_number(number, 0, "short")[0], 9)[0] for number in range(4)]
    write_clip(films / "film.mp4", (255 * torch.cat(parts)).round().to(torch.uint8))
    (films / "film.txt").write_text("a film")
    found = []
    for elsewhere in (elsewhere_of(2, codec), None):
        source = FileSource(
            films, 9, (64, 64), cut=scene_finder("windows", None), cut_name="windows"
        )
        out = tmp_path / f"out-{len(found)}"
        pack(source, out, codec, TinyText(), PackOptions(elsewhere=elsewhere))
        found.append(contents(out))
    assert found[0] == found[1]


def test_frames_that_are_left_are_counted(tmp_path: Path, codec: TinyCodec) -> None:
    """Catches a long file of which nobody hears that most of it is not used."""
    write_clips(tmp_path / "clips", 1, 0, "short", 33)
    for elsewhere in (None, elsewhere_of(1, codec)):
        out = tmp_path / ("here" if elsewhere is None else "there")
        summary = pack_tiny(tmp_path / "clips", out, codec, elsewhere=elsewhere)
        assert (summary.longer, summary.frames_left) == (1, 24)


class Deadly(TinyCodec):
    def encode(self, videos: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("not reached")


def test_a_killed_process_is_named(folder: Path, tmp_path: Path, codec: TinyCodec) -> None:
    """Catches a pack that waits for ever, or that counts the clips of a killed process as bad."""
    with pytest.raises(UserError, match="a process was killed, perhaps for want of memory"):
        load = partial(Deadly, codec.first, codec.rest, codec.scale)
        pack_tiny(
            folder, tmp_path / "out", codec, elsewhere=Elsewhere(in_processes(2, "fork"), load)
        )


def test_processes_have_the_codec_that_the_index_names(
    folder: Path, tmp_path: Path, codec: TinyCodec
) -> None:
    """Catches latents of a codec that was changed or mistaken while others were at work."""
    other = Elsewhere(HERE, partial(TinyCodec.load, SHIPPED))
    with pytest.raises(UserError, match="another codec was loaded in a process: tiny-codec-"):
        pack_tiny(folder, tmp_path / "out", codec, elsewhere=other)
