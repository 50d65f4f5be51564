"""Shards that lie far away: what is read is fetched, kept up to a limit, and shared."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem

from selfforcing_dfd.cli.main import main
from selfforcing_dfd.common import UserError
from selfforcing_dfd.data import places
from selfforcing_dfd.data.kept import FOLDER_VARIABLE, LIMIT_VARIABLE, Kept
from selfforcing_dfd.data.places import file_beside, is_remote, place_of
from selfforcing_dfd.data.shards import Sample, ShardError, ShardReader

GIGABYTE = 1e9


class Counting(LocalFileSystem):
    """A folder behind the protocol `far`, which writes down every read of a part of a file.

    faults: what happens to the next reads; then they succeed.
    """

    protocol = "far"
    cachable = False
    faults: list[str] = []
    log: Path

    def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        content: bytes = super().cat_file(path, start, end)
        if start is None:
            return content
        with self.log.open("a") as file:
            file.write(f"{Path(path).name} {start}\n")
        fault = self.faults.pop(0) if self.faults else ""
        if fault == "error":
            raise ConnectionResetError("reset by the other side")
        if fault == "short":
            return content[:-1]
        if fault == "flip":
            return bytes([content[0] ^ 1]) + content[1:]
        return content


fsspec.register_implementation("far", Counting, clobber=True)


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An own place for what is fetched; no waiting between tries."""
    folder = tmp_path / "kept"
    monkeypatch.setenv(FOLDER_VARIABLE, str(folder))
    monkeypatch.setattr(places, "WAIT_S", 0.0)
    monkeypatch.setattr(Counting, "faults", [])
    monkeypatch.setattr(Counting, "log", tmp_path / "log", raising=False)
    yield folder
    fsspec.filesystem("memory").store.clear()


def in_memory(folder: Path) -> str:
    """The address of a copy."""
    files = fsspec.filesystem("memory")
    for path in folder.iterdir():
        files.pipe_file(f"/set/{path.name}", path.read_bytes())
    return "memory://set"


def reads(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def is_same(one: Sample, other: Sample) -> bool:
    arrays = torch.equal(one.latents, other.latents) and torch.equal(one.text, other.text)
    return arrays and (one.key, one.caption) == (other.key, other.caption)


def test_an_address_is_told_from_a_folder() -> None:
    """Catches a folder with a colon that is sought in the network."""
    for address in ("s3://bucket/set", "hf://datasets/me/set", "simplecache::s3://b", "file:///a"):
        assert is_remote(address)
    for folder in ("data/set", "/data/a:b//c", "C:/set", Path("s3:/bucket")):
        assert not is_remote(folder)


def test_remote_shards_are_those_on_disk(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches ranges of another place, and a reader that needs a folder."""
    address = in_memory(packed)
    here = ShardReader(packed)
    there = ShardReader(address)
    assert there.index_hash == here.index_hash
    assert all(is_same(there[number], here[number]) for number in range(len(here)))
    assert there.members(3) == here.members(3)
    assert main(["verify", address]) == 0
    assert "memory://set: 12 samples in 3 shards, as packed" in capsys.readouterr().out
    with pytest.raises(UserError, match="memory://set is read from afar and cannot be changed"):
        _ = there.folder


def test_files_beside_shards_are_found(own_shards: Path) -> None:
    """Catches a codec of one's own that is not used because its shards are remote."""
    (own_shards / "codec.safetensors").write_bytes(b"a codec")
    for place in (in_memory(own_shards), str(own_shards)):
        found = file_beside(place, "codec.safetensors")
        assert found is not None
        assert found.read_bytes() == b"a codec"
        assert file_beside(place, "other.safetensors") is None


def test_only_what_is_read_is_fetched_and_only_once(packed: Path, tmp_path: Path) -> None:
    """Catches whole shards for one sample, and a second epoch through the network."""
    reader = ShardReader(f"far://{packed}")
    reader[0]
    first = reads(tmp_path / "log")
    assert len(first) == 2, "latents and text; opening has read the same sample"
    for _ in range(2):
        for number in range(len(reader)):
            reader[number]
    ShardReader(f"far://{packed}")[5]
    assert len(reads(tmp_path / "log")) == 2 * len(reader)


def test_broken_transfers_are_made_again(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a night's training that ends with one lost packet, and bytes that nobody checks."""
    monkeypatch.setattr(Counting, "faults", ["error", "short", "flip", "", "flip", "error"])
    here = ShardReader(packed)
    there = ShardReader(f"far://{packed}")
    assert all(is_same(there[number], here[number]) for number in range(len(here)))
    assert Counting.faults == []


def test_what_stays_broken_is_named(own_shards: Path, kept: Path) -> None:
    """Catches tries without end, and damaged bytes that are kept for later."""
    reader = ShardReader(f"far://{own_shards}")
    Counting.faults = ["flip"] * places.TRIES
    with pytest.raises(ShardError, match=r"text\.npy is not what .*Upload the folder again"):
        reader[7]
    whole = {member.crc32 for entry in reader.index.samples for member in entry.members.values()}
    assert {zlib.crc32(path.read_bytes()) for path in (kept / "pieces").iterdir()} <= whole
    Counting.faults = ["error"] * places.TRIES
    with pytest.raises(UserError, match=r"cannot be read after 5 tries \(ConnectionResetError"):
        reader[7]
    assert reader[7].key == "000007"


def test_a_folder_that_is_not_whole_is_refused_when_opening(own_shards: Path) -> None:
    """Catches an upload that stopped half-way and is found after a day."""
    shard = own_shards / "shard-000001.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[:-512])
    with pytest.raises(ShardError, match=r"shard-000001\.tar has \d+ bytes, the index wants \d+"):
        ShardReader(f"far://{own_shards}")
    shard.unlink()
    with pytest.raises(ShardError, match=r"shard-000001\.tar is missing"):
        ShardReader(in_memory(own_shards))
    fsspec.filesystem("memory").rm("/set/index.json")
    with pytest.raises(ShardError, match=r"memory://set: no index\.json"):
        ShardReader("memory://set")


def test_a_damaged_piece_on_disk_is_fetched_again(packed: Path, kept: Path, tmp_path: Path) -> None:
    """Catches a power cut that leaves half a file, which is believed ever after."""
    reader = ShardReader(f"far://{packed}")
    before = reader[2]
    for path in (kept / "pieces").iterdir():
        path.write_bytes(path.read_bytes()[:-3])
    fetched = len(reads(tmp_path / "log"))
    assert is_same(reader[2], before)
    assert len(reads(tmp_path / "log")) == fetched + 2
    assert is_same(reader[2], before)
    assert len(reads(tmp_path / "log")) == fetched + 2


def test_the_oldest_pieces_make_room(tmp_path: Path) -> None:
    """Catches a disk that fills up, and one piece in use that is thrown away first."""
    kept = Kept(tmp_path / "small", 1000)
    fetched: list[str] = []

    def get(name: str, size: int = 100) -> None:
        def fetch() -> bytes:
            fetched.append(name)
            return bytes(size)

        assert kept.get(name, fetch, lambda content: len(content) == size) == bytes(size)
        assert kept.used() <= 1000

    for number in range(40):
        get(f"piece-{number}")
        get("in-use")
    assert fetched.count("in-use") == 1
    get("too-large", 2000)
    get("too-large", 2000)
    assert fetched.count("too-large") == 2
    assert kept.used() >= 500


def test_pieces_on_their_way_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a count of all pieces that leaves out those that others are writing just then."""
    kept = Kept(tmp_path / "kept", 400)
    write = Path.write_bytes

    def slowly(self: Path, content: bytes) -> int:
        time.sleep(0.005)
        return write(self, content)

    def get(number: int) -> int:
        kept.get(f"piece-{number}", lambda: bytes(100), lambda content: True)
        return kept.used()

    monkeypatch.setattr(Path, "write_bytes", slowly)
    with ThreadPoolExecutor(8) as pool:
        used = list(pool.map(get, range(64)))
    assert max(used) <= 400


def test_a_full_disk_ends_nothing(
    packed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Catches training that ends because nothing more can be kept."""

    def full(self: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    reader = ShardReader(f"far://{packed}")
    assert [reader[number].key for number in (1, 1)] == ["000001"] * 2
    assert len(reads(tmp_path / "log")) == 6


def read_all(address: str, rank: int, done: Any) -> None:
    """Every sample, from another one on for each process; whether all were right and few kept."""
    right = False
    kept = Kept(Path(os.environ[FOLDER_VARIABLE]), 0)
    try:
        reader = ShardReader(address)
        here = ShardReader(address.removeprefix("far://"))
        numbers = [(number + 4 * rank) % len(reader) for number in range(2 * len(reader))]
        right = all(is_same(reader[number], here[number]) for number in numbers)
    finally:
        done.put((right, kept.used()))


@pytest.mark.parametrize("limit", [20_000, 10**9])
def test_processes_share_what_is_kept(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """Catches every rank fetching all of it, and pieces that vanish under another's hands."""
    monkeypatch.setenv(LIMIT_VARIABLE, str(limit / GIGABYTE))
    context = multiprocessing.get_context("fork")
    done = context.SimpleQueue()
    address = f"far://{packed}"
    ranks = [context.Process(target=read_all, args=(address, rank, done)) for rank in range(3)]
    for process in ranks:
        process.start()
    found = [done.get() for _ in ranks]
    for process in ranks:
        process.join()
        assert process.exitcode == 0
    assert all(right for right, _ in found)
    assert all(used <= limit for _, used in found)
    if limit > 20_000:
        assert len(reads(tmp_path / "log")) == 2 * 12, "each piece once, by one of them"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("s3://bucket/set", "s3://bucket/set.* cannot be opened .*: pip install s3fs"),
        ("nonsense://set", "nonsense://set.* use an address that fsspec knows"),
    ],
)
def test_a_missing_package_is_named(
    address: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a traceback where a protocol needs a package."""
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=message):
        place_of(address)


def test_a_student_learns_the_same_from_afar(packed: Path, tmp_path: Path) -> None:
    """Catches a place in training that knows folders only."""
    made = []
    for name, place in (("here", str(packed)), ("there", in_memory(packed))):
        settings = ["run.student_updates=1", "run.device=cpu", f"run.out={tmp_path}"]
        settings += [
            "model.compile=false",
            "model.compute=float32",
            "batch.size=2",
            "batch.micro=2",
            "rollout.frames=3",
            "report.clips=0",
        ]
        settings += [f"data.shards={place}", f"run.name={name}", "checkpoint.every=1"]
        assert main(["train", "--config", "tiny/causal.yaml", *settings]) == 0
        made.append((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])
    losses = [line.partition('"seconds"')[0] for line in made]
    assert losses[0] == losses[1]
    assert '"loss"' in losses[0]
