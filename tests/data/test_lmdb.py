"""LMDBs as Self-Forcing writes them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lmdb
import pytest
import torch
from imported_data import PROMPTS, ROW, draw, write_lmdb
from torch import Tensor

from selfforcing_dfd.cli.main import main
from selfforcing_dfd.data.format import PackError
from selfforcing_dfd.data.pack import PackOptions, pack
from selfforcing_dfd.data.shards import ShardReader
from selfforcing_dfd.data.sources.lmdb import LmdbSource
from selfforcing_dfd.tiny.text import TinyText


def import_lmdb(source: LmdbSource, out: Path, **settings: Any) -> ShardReader:
    pack(source, out, None, TinyText(), PackOptions(**settings))
    return ShardReader(out)


@pytest.mark.parametrize("leading", [(), (1,)])
def test_clean_latents_of_an_lmdb_come_back(tmp_path: Path, leading: tuple[int, ...]) -> None:
    """Catches C and F exchanged, and DFD's rows, which carry a leading one.

    Exact: both sides are float16.
    """
    shape = (*leading, *ROW)
    rows = {number: draw(number).expand(shape) for number in range(4)}
    reader = import_lmdb(
        LmdbSource(write_lmdb(tmp_path / "lmdb", rows, PROMPTS)), tmp_path / "out", shard_size=3
    )
    reader.verify()
    assert reader.captions == [" ".join(prompt.split()) for prompt in PROMPTS]
    assert [entry.key for entry in reader.index.samples] == [
        f"row-00000{number}" for number in range(4)
    ]
    for number in range(4):
        assert reader[number].latents.equal(draw(number))
        assert reader[number].text.equal(
            TinyText().encode([reader.captions[number]])[0].half().float()
        )


@pytest.mark.parametrize(("step", "taken"), [(None, 4), (-1, 4), (0, 0), (2, 2)])
def test_a_trajectory_gives_the_latent_that_is_asked_for(
    tmp_path: Path, step: int | None, taken: int
) -> None:
    """Catches noise taken for data: trajectories run from noise to clean."""
    rows = {number: torch.stack([draw(number, point) for point in range(5)]) for number in range(2)}
    folder = write_lmdb(tmp_path / "lmdb", rows, PROMPTS)
    source = LmdbSource(folder) if step is None else LmdbSource(folder, step)
    reader = import_lmdb(source, tmp_path / "out")
    assert [reader[number].latents.equal(draw(number, taken)) for number in range(2)] == [
        True,
        True,
    ]
    assert reader.index.about["source"]["step"] == taken


def test_a_folder_of_environments_is_one_data_set(tmp_path: Path) -> None:
    """Catches rows of the second environment under the prompts of the first, and equal keys."""
    (tmp_path / "all").mkdir()
    for name, first in (("shard_0", 0), ("shard_1", 2)):
        rows = {number: draw(first + number) for number in range(2)}
        write_lmdb(tmp_path / "all" / name, rows, PROMPTS[first:])
    reader = import_lmdb(LmdbSource(tmp_path / "all"), tmp_path / "out")
    assert [reader[number].latents.equal(draw(number)) for number in range(4)] == [True] * 4
    assert reader.captions[2] == PROMPTS[2]
    assert len({entry.key for entry in reader.index.samples}) == 4


def test_rows_that_cannot_be_used_are_left_out_by_name(tmp_path: Path) -> None:
    """Catches one broken row of thousands that stops the import, or is packed."""
    rows = {0: draw(0), 1: draw(1)[:2], 2: draw(2) * float("nan"), 3: draw(3)}
    folder = write_lmdb(
        tmp_path / "lmdb", rows, [*PROMPTS[:3], " "], shape="5 " + " ".join(map(str, ROW))
    )
    reader = import_lmdb(LmdbSource(folder), tmp_path / "out")
    assert len(reader) == 1
    assert [(refusal["file"], refusal["reason"]) for refusal in reader.index.refused] == [
        ("row-000001", "latents have 1536 bytes, want 2304 for float16 3 16 4 6"),
        ("row-000002", "its latents hold NaN or infinity"),
        ("row-000003", "no caption"),
        ("row-000004", "no latents_4_data in the LMDB"),
    ]
    with pytest.raises(PackError, match=r"row-000001: latents have 1536 bytes.*without --strict"):
        import_lmdb(LmdbSource(folder), tmp_path / "strict", strict=True)


def test_a_shape_that_lost_its_row_can_be_named(tmp_path: Path) -> None:
    """Catches an LMDB that can never be imported because latents_shape is N alone.

    Self-Forcing's script takes the shape from its last file, which may have held nothing new.
    """
    folder = write_lmdb(tmp_path / "lmdb", {0: draw(0)}, PROMPTS, shape="1")
    with pytest.raises(
        PackError, match=r"latents_shape is lmdb: 1; want .* --row-shape, such as 21x16x60x104"
    ):
        LmdbSource(folder)
    reader = import_lmdb(LmdbSource(folder, row_shape=ROW), tmp_path / "out")
    assert reader[0].latents.equal(draw(0))


def test_what_is_no_such_lmdb_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a TypeError for a missing key, and an ImportError without what to install."""
    with pytest.raises(PackError, match=r"no LMDB here; want a folder with data\.mdb"):
        LmdbSource(tmp_path)
    lmdb.open(str(tmp_path / "empty"), map_size=2**20).close()
    with pytest.raises(
        PackError, match="no key latents_shape, which is written last; it has no keys at all"
    ):
        LmdbSource(tmp_path / "empty")
    folder = write_lmdb(tmp_path / "lmdb", {0: draw(0)}, PROMPTS)
    with pytest.raises(PackError, match=r"--step 1: a sample of .* has 1 latents"):
        LmdbSource(folder, step=1)
    with pytest.raises(
        PackError, match=r"prompts without embeddings; name a text encoder with --text"
    ):
        pack(LmdbSource(folder), tmp_path / "out")
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(PackError, match="pip install lmdb"):
        LmdbSource(folder)


def test_an_interrupted_import_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches prompts of 30,000 rows encoded again after a crash, and another --step going on.

    As for packing.
    """
    rows = {number: torch.stack([draw(number, point) for point in range(2)]) for number in range(4)}
    source = str(write_lmdb(tmp_path / "lmdb", rows, PROMPTS))
    arguments = [
        "import",
        source,
        "--text",
        "tiny",
        "--shard-size",
        "2",
        "--negative-prompt",
        "grey",
    ]
    assert main([*arguments, "--out", str(tmp_path / "once")]) == 0
    encode = TinyText.encode

    def failing(self: TinyText, captions: list[str]) -> Tensor:
        if captions == [PROMPTS[3]]:
            raise OSError("the disk is gone")
        return encode(self, captions)

    monkeypatch.setattr(TinyText, "encode", failing)
    assert main([*arguments, "--out", str(tmp_path / "twice")]) == 2
    monkeypatch.undo()
    assert main([*arguments, "--out", str(tmp_path / "twice"), "--resume", "--step", "0"]) == 2
    assert main([*arguments, "--out", str(tmp_path / "twice"), "--resume"]) == 0
    assert {p.name: p.read_bytes() for p in (tmp_path / "twice").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "once").iterdir()
    }
