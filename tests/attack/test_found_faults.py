"""What `make attack` found in this package, a test each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from selfforcing_dfd.cli.main import main
from selfforcing_dfd.common import sealed, shipped
from selfforcing_dfd.data.format import PackError
from selfforcing_dfd.data.merge import merge
from selfforcing_dfd.data.shards import ShardError, ShardReader
from selfforcing_dfd.data.sources.lmdb import LmdbSource
from selfforcing_dfd.data.sources.tiny import make_tiny_shards
from selfforcing_dfd.data.sources.video import read_video
from selfforcing_dfd.tiny.world import write_clips
from selfforcing_dfd.training.checkpoint import CheckpointManager
from selfforcing_dfd.weights.checkpoint_files import deep_damage
from selfforcing_dfd.weights.read import load_network
from selfforcing_dfd.weights.stored import WeightsError
from tests.data.imported_data import PROMPTS, draw, write_lmdb
from tests.tiny_models import save_network, tiny_network


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("found") / "shards"
    make_tiny_shards(folder, 2, 0, "short", 3, shipped("assets/tiny/codec.safetensors"))
    return folder


@pytest.mark.parametrize(
    ("path", "junk"),
    [
        (("text_shape", 0), [1]),
        (("text_shape", 0), "a disc"),
        (("about",), 0.5),
        (("latent_shape", 1), 2**70),
        (("fingerprints", "codec"), None),
        (("shards", 0, "bytes"), "0"),
        (("shards", 0, "name"), "../x.tar"),
        (("samples", 0, "caption"), 3),
        (("samples", 0, "members", "text.npy"), [0, 0.5, 1]),
    ],
)
def test_an_index_of_other_types_is_refused(
    shards: Path, tmp_path: Path, path: tuple[Any, ...], junk: Any
) -> None:
    """Catches a TypeError from deep within for an index that another program has sealed."""
    copied = Path(shutil.copytree(shards, tmp_path / "shards"))
    index = json.loads((copied / "index.json").read_text())
    place = index
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = junk
    (copied / "index.json").write_text(json.dumps(sealed(index)))
    with pytest.raises(ShardError, match=r"index\.json: not an index this program can read"):
        ShardReader(copied)


def test_an_index_that_is_nested_too_deeply_is_refused(shards: Path, tmp_path: Path) -> None:
    """Catches a RecursionError, also where shards are merged or packed again."""
    copied = Path(shutil.copytree(shards, tmp_path / "shards"))
    (copied / "index.json").write_text("[" * 100_000)
    with pytest.raises(ShardError, match="not an index"):
        ShardReader(copied)
    with pytest.raises(PackError, match=r"damaged.*pack this part again"):
        merge([copied], tmp_path / "merged")


def test_a_damaged_index_is_no_finished_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a JSONDecodeError where a pack is repeated over a folder whose index is damaged."""
    clips = tmp_path / "clips"
    assert main(["clips", str(clips), "--num", "1"]) == 0
    pack = ["pack", str(clips), "--codec", "tiny", "--out", str(tmp_path / "out")]
    assert main(pack) == 0
    (tmp_path / "out" / "index.json").write_text("{")
    assert main(pack) == 2
    assert "error: " in capsys.readouterr().err
    assert main([*pack, "--overwrite"]) == 0


def test_an_lmdb_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    """Catches SIGBUS: the process ended without a word where it read beyond a mapped file's end."""
    folder = write_lmdb(tmp_path / "lmdb", {n: draw(n) for n in range(3)}, PROMPTS)
    data = (folder / "data.mdb").read_bytes()
    (folder / "data.mdb").write_bytes(data[: len(data) // 2])
    with pytest.raises(PackError, match=r"data\.mdb: has [\d,]+ bytes, want at least"):
        LmdbSource(folder)


def test_a_file_of_torch_save_under_another_name_is_told(tmp_path: Path) -> None:
    """Catches a SafetensorError with a traceback: torch.load goes by the ending of the name."""
    path = tmp_path / "student.safetensors"
    torch.save({"w": torch.zeros(3)}, path)
    with pytest.raises(WeightsError, match=r"one of torch\.save; rename it to student\.pt"):
        load_network(path)


def test_weights_that_are_not_finite_are_not_loaded(tmp_path: Path) -> None:
    """Catches a stream of grey pictures, and a conversion that hands the damage on."""
    network = tiny_network(0, torch.float32)
    path = tmp_path / "student.safetensors"
    save_network(path, network)
    load_network(path)
    harmed = bytearray(path.read_bytes())
    harmed[-4:] = b"\x00\x00\xc0\x7f"  # not a number
    path.write_bytes(harmed)
    with pytest.raises(WeightsError, match="holds values that are not finite"):
        load_network(path)


def test_a_checkpoint_under_another_number_is_damaged(tmp_path: Path) -> None:
    """Catches a link or a copy of an older checkpoint that passes for the newest one."""
    manager = CheckpointManager(tmp_path)
    older = manager.save(1, {"w": torch.zeros(3)})
    shutil.copytree(older, tmp_path / "student_update=000002")
    found = deep_damage(tmp_path / "student_update=000002")
    assert found == "it is the checkpoint of student update 1, by another name"
    assert manager.latest() == older


def test_a_clip_with_odd_letters_in_its_metadata_is_read(tmp_path: Path) -> None:
    """Catches a UnicodeDecodeError of PyAV that ends the packing of all other clips."""
    write_clips(tmp_path, 1, seed=0, level="short", num_frames=9)
    (path,) = tmp_path.glob("*.mp4")
    wanted = read_video(path, 9)
    harmed = bytearray(path.read_bytes())
    brand = harmed.index(b"iso2")  # the kinds of file that it says it is
    harmed[brand : brand + 4] = b"\x95\xff\x95\xff"
    path.write_bytes(harmed)
    assert torch.equal(read_video(path, 9), wanted)
