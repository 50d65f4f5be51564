"""Clips and captions: flipped bits, other containers, nothing at all."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import av
import numpy as np
import torch

from selfforcing_dfd.data.shards import ShardReader
from selfforcing_dfd.data.source import ClipError
from selfforcing_dfd.data.sources.video import read_last_frames, read_video
from selfforcing_dfd.rng import generator
from selfforcing_dfd.tiny.world import draw_factors, render
from tests.attack.harms import files_in, harm_content, harm_file
from tests.attack.trials import Kind, Tell, Wrong, command

FRAMES = 9
PACK = ("pack", "--codec", "tiny", "--frames", "9")
CONTAINERS = {"mp4": "libx264", "matroska": "libx264", "mpegts": "mpeg2video", "avi": "mpeg4"}
STRANGE = ("#EXTM3U\nsegment.ts\n", "concat:a.mp4|b.mp4", "ffconcat version 1.0\nfile a.mp4\n", "")


class Clips(Kind):
    """Frames are those of the clip, or the clip is refused by its name."""

    name = "clips"

    def prepare(self, folder: Path) -> None:
        self.clips = folder / "clips"
        self.clips.mkdir()
        factors = draw_factors(2, generator(0, "attack"))
        videos = (render(factors, FRAMES) * 255).round().to(torch.uint8).numpy()
        for number, video in enumerate(videos):
            write(self.clips / f"{number}.mp4", video, "mp4")
            (self.clips / f"{number}.txt").write_text("a disc moves left")
        self.other = {name: folder / name for name in CONTAINERS}
        for name, path in self.other.items():
            write(path, videos[0], name)
        command(*PACK, str(self.clips), "--out", str(folder / "shards"))
        self.wanted = {name: read_video(path, FRAMES) for name, path in self.other.items()}

    def attack(self, chance: random.Random, place: Path, tell: Tell) -> None:
        if chance.random() < 0.3:
            self.attack_folder(chance, place, tell)
            return
        name = chance.choice(list(CONTAINERS))
        path = Path(shutil.copyfile(self.other[name], place / "clip.mp4"))
        if chance.random() < 0.1:
            path.write_text(chance.choice(STRANGE))
            tell(f"{path.read_text()!r}")
        else:
            tell(f"{name}: {harm_content(path, chance)}")
        got = read_video(path, FRAMES)
        is_same = torch.equal(got, self.wanted[name])
        # the transport stream and MPEG-4 part 2 hold no more redundancy than this finds
        if not is_same and name == "mp4" and not only_pictures_differ(path, self.other[name]):
            raise Wrong("other pictures, without a word")
        read_last_frames(path, FRAMES, (64, 64))

    def attack_folder(self, chance: random.Random, place: Path, tell: Tell) -> None:
        """`pack` of two clips of which one file is harmed: the other clip is always packed."""
        clips = place / "clips"
        shutil.copytree(self.clips, clips)
        harmed = chance.choice(files_in(clips))
        tell(harm_file(harmed, chance))
        out = place / "shards"
        said = command(*PACK, str(clips), "--out", str(out))
        num_packed = len(ShardReader(out))
        is_named = harmed.stem in said or not harmed.is_file()
        if num_packed < 1 or (num_packed < 2 and not is_named):
            raise Wrong(f"{num_packed} packed of 2, without a word: {said}")
        command("verify", str(out))
        if num_packed < 2:
            raise ClipError(harmed.name, said)


def only_pictures_differ(harmed: Path, whole: Path) -> bool:
    """Whether the harm lies in coded pictures or in the decoder's parameters alone.

    H.264 has no checksum: of flipped bits there, some decode to other pictures without an error.
    """
    before = whole.read_bytes()
    after = harmed.read_bytes()
    if len(before) != len(after):
        return False
    coded = {place for name in (b"mdat", b"avcC") for place in content_of(before, name)}
    changed = {place for place, byte in enumerate(before) if byte != after[place]}
    return changed <= coded


def content_of(file: bytes, name: bytes) -> range:
    """Where the content of an mp4's box lies."""
    begins = file.index(name)
    size = int.from_bytes(file[begins - 4 : begins], "big")
    return range(begins + 4, begins - 4 + size)


def write(path: Path, video: np.ndarray, container: str) -> None:
    """uint8 [T, H, W, 3] in a container, with a coding that is usual in it."""
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(CONTAINERS[container], rate=16 if container != "mpegts" else 25)
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for picture in video:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode(None))
