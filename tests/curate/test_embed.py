"""Features of clips: which frames, which rows, and what a kill leaves."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_files import write_clip
from in_processes import run_until_killed
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from selfforcing_dfd.common import UserError
from selfforcing_dfd.curate import embed
from selfforcing_dfd.curate.embed import EmbedSettings, embed_clips, key_frames
from selfforcing_dfd.curate.folder import CLIPS, EMBED, FEATURES, read_embedded
from selfforcing_dfd.curate.intake import Intake
from selfforcing_dfd.metrics.features import PixelEncoder, Sampled, unit
from selfforcing_dfd.processes.engine import in_processes
from selfforcing_dfd.tiny.world import clip_number, render

PIXELS = EmbedSettings("pixels")


def contents(folder: Path) -> dict[str, bytes]:
    """Of the files that stay, without where the source lies."""
    return {name: (folder / name).read_bytes() for name in (EMBED, FEATURES, CLIPS)}


def embed_until_killed(vectors: int, intake: Intake, folder: Path) -> None:
    """In a process that is killed when so many vectors were made."""
    made = 0
    whole = embed.vector_of

    def dying(*args: Any) -> np.ndarray:
        nonlocal made
        made += 1
        if made > vectors:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*args)

    embed.vector_of = dying
    embed_clips(intake, intake.clips(), folder, PIXELS)


def test_the_middles_of_equal_parts_are_looked_at() -> None:
    """Catches a first frame, often black, that stands for a third of a clip."""
    assert key_frames(81, 3) == [13, 40, 67]
    assert key_frames(9, 1) == [4]
    assert key_frames(2, 3) == [0, 1, 1]


def test_a_row_is_the_mean_of_its_clips_frames(intake: Intake, made: Path, tmp_path: Path) -> None:
    """Catches rows of other clips, frames of another place, and a broken clip that shifts all."""
    embedded = embed_clips(intake, intake.clips(), tmp_path / "f", PIXELS)
    assert list(embedded.problems) == ["bad.mp4"]
    assert embedded.names[-1] == "bad.mp4"
    assert not embedded.features[-1].any()
    norms = np.linalg.norm(embedded.features[:-1], axis=1)
    np.testing.assert_allclose(norms, 1, atol=1e-6)
    video = (255 * render(clip_number(7, 0, "short")[0], 9)[0]).round().to(torch.uint8)
    frames = video[[1, 4, 7]]
    wanted = unit(PixelEncoder()(Sampled(frames, frames, frames, 1.0)).mean(dim=0))
    assert float(wanted @ embedded.features[7]) > 0.997
    assert float(wanted @ embedded.features[8]) < 0.99


def test_a_killed_run_goes_on_and_processes_change_nothing(
    intake: Intake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches rows that are lost, made twice or shifted by kill -9, and half a line at the end."""
    clips = intake.clips()
    whole = tmp_path / "whole"
    embed_clips(intake, clips, whole, PIXELS)
    monkeypatch.setattr(embed, "FILES_AT_ONCE", 4)
    folder = tmp_path / "killed"
    journal = folder / f"{EMBED}.partial"
    for vectors, lines in ((10, 3), (9, 5)):
        run_until_killed(embed_until_killed, vectors, intake, folder)
        assert len(journal.read_text().splitlines()) == lines
    journal.write_bytes(journal.read_bytes()[:-9])
    with pytest.raises(UserError, match="pictures was 3, is 2"):
        embed_clips(intake, clips, folder, replace(PIXELS, pictures=2))
    embed_clips(intake, clips, folder, PIXELS, engine=in_processes(2, "fork"))
    assert contents(folder) == contents(whole)
    assert sorted(path.name for path in folder.iterdir()) == sorted((EMBED, FEATURES, CLIPS))
    with pytest.raises(UserError, match="holds features; choose another --out"):
        embed_clips(intake, clips, folder, PIXELS)


def test_a_kill_between_the_last_steps_is_mended(intake: Intake, tmp_path: Path) -> None:
    """Catches features that have their name already and are called lost."""
    folder = tmp_path / "f"
    clips = intake.clips()
    embed_clips(intake, clips, folder, PIXELS)
    before = contents(folder)
    head = {name: json.loads(before[EMBED])[name] for name in json.loads(before[EMBED])}
    for name in ("source", "sha256_of_rows", "sha256"):
        del head[name]
    done = {"files": len(clips), "clips": len(clips), "problems": {"24": "cannot be read"}}
    lines = [json.dumps(line) + "\n" for line in (head, done)]
    (folder / f"{EMBED}.partial").write_text("".join(lines))
    (folder / EMBED).unlink()
    embed_clips(intake, clips, folder, PIXELS)
    assert contents(folder)[EMBED] == before[EMBED]
    (folder / f"{EMBED}.partial").write_text("".join(lines))
    for name in (EMBED, FEATURES):
        (folder / name).unlink()
    with pytest.raises(UserError, match="is gone; start again with --overwrite"):
        embed_clips(intake, clips, folder, PIXELS)


def test_windows_of_a_long_file_have_rows_of_their_own(tmp_path: Path) -> None:
    """Catches windows that all show the beginning of their file."""
    parts = [render(clip_number(number, 0, "short")[0], 9)[0] for number in (3, 4)]
    film = tmp_path / "films" / "film.mp4"
    film.parent.mkdir()
    write_clip(film, (255 * torch.cat(parts)).round().to(torch.uint8))
    intake = Intake(film.parent, 9, Fraction(16), cut="windows")
    embedded = embed_clips(intake, intake.clips(), tmp_path / "f", PIXELS)
    assert embedded.names == ["film.mp4#0", "film.mp4#9"]
    for number, part in enumerate(parts):
        frames = (255 * part[[1, 4, 7]]).round().to(torch.uint8)
        wanted = unit(PixelEncoder()(Sampled(frames, frames, frames, 1.0)).mean(dim=0))
        cosines = embedded.features @ wanted.numpy()
        assert int(cosines.argmax()) == number
        assert cosines[number] > 0.99
    assert [clip.first for clip in embedded.clips()] == [0, 9]


def test_a_clip_that_the_encoder_cannot_take_is_left_out(tmp_path: Path) -> None:
    """Catches one tiny picture that ends a run over a million clips, and rows of NaN."""
    films = tmp_path / "films"
    films.mkdir()
    write_clip(films / "small.mp4", torch.zeros(9, 16, 16, 3, dtype=torch.uint8))
    write_clip(films / "usual.mp4", (255 * torch.rand(9, 64, 64, 3)).to(torch.uint8))
    intake = Intake(films, 9, Fraction(16))
    embedded = embed_clips(intake, intake.clips(), tmp_path / "f", EmbedSettings())
    assert list(embedded.problems) == ["small.mp4"]
    assert "are smaller than a block" in embedded.problems["small.mp4"]
    alone = replace(intake, num_frames=1)
    with pytest.raises(UserError, match=r"can be used; the first: .*its features are not finite"):
        embed_clips(alone, alone.clips()[1:], tmp_path / "g", EmbedSettings("motion"))


def test_clip_is_read_from_a_folder(intake: Intake, tmp_path: Path) -> None:
    """Catches an encoder that works in `evaluate` alone, and weights that nothing records."""
    tower = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 2}
    seen = {"image_size": 32, "patch_size": 16}
    config = CLIPConfig(
        text_config={**tower, "num_hidden_layers": 1},
        vision_config={**tower, **seen, "num_hidden_layers": 1},
        projection_dim=12,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    size = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size).save_pretrained(
        tmp_path / "clip"
    )
    settings = EmbedSettings(f"clip_projected={tmp_path / 'clip'}")
    embedded = embed_clips(intake, intake.clips()[:3], tmp_path / "f", settings)
    assert embedded.features.shape == (3, 12)
    assert len(embedded.about["encoder"]["weights_sha256"]) == 64
    with pytest.raises(UserError, match="clip_projected=FOLDER"):
        embed_clips(intake, intake.clips(), tmp_path / "g", EmbedSettings("clip_projected"))


def test_a_folder_that_was_changed_is_refused(made: Path, tmp_path: Path) -> None:
    """Catches features of one run read with the clips of another."""
    with pytest.raises(UserError, match=r"has no embed\.json; run selfforcing-dfd curate embed"):
        read_embedded(tmp_path)
    (tmp_path / EMBED).write_text((made / EMBED).read_text().replace("pictures", "picture"))
    with pytest.raises(UserError, match="is not as it was written; run"):
        read_embedded(tmp_path)
    for name in (EMBED, FEATURES):
        (tmp_path / name).write_bytes((made / name).read_bytes())
    (tmp_path / CLIPS).write_text("\n".join((made / CLIPS).read_text().splitlines()[1:]))
    with pytest.raises(UserError, match=r"holds \[25, 577\] numbers and clips.jsonl names 24"):
        read_embedded(tmp_path)


def test_a_source_without_a_usable_clip_is_named(tmp_path: Path) -> None:
    """Catches an empty set that fails two steps later."""
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    intake = Intake(tmp_path, 9, Fraction(16))
    with pytest.raises(UserError, match=r"no clip of .* can be used; the first: cannot be read"):
        embed_clips(intake, intake.clips(), tmp_path / "f", PIXELS)
