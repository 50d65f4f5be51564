"""Shard folders: tars and index cut, flipped, swapped, or with values that are no numbers."""

from __future__ import annotations

import json
import random
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from selfforcing_dfd.common import sealed, shipped
from selfforcing_dfd.data.shards import ShardReader
from selfforcing_dfd.data.sources.tiny import make_tiny_shards
from tests.attack.harms import copy, files_in, harm_file
from tests.attack.trials import Kind, Tell, Wrong, command

JUNK: tuple[Any, ...] = (
    *(-1, 0, 1, 2**62, 2**70, 0.5, None, True, "", "x", "../x.tar", [], [1], [0, 0, 0], {}, "0"),
    *(float("nan"), [2**62, 1, 1, 1], "a disc"),
)


class Shards(Kind):
    """What is read is what was packed; `verify` knows where it is not."""

    name = "shards"

    def prepare(self, folder: Path) -> None:
        self.shards = folder / "shards"
        basis = shipped("assets/tiny/codec.safetensors")
        make_tiny_shards(self.shards, 6, 0, "short", 3, basis)
        self.wanted = contents(self.shards)
        command("verify", str(self.shards))

    def attack(self, chance: random.Random, place: Path, tell: Tell) -> None:
        shards = copy(self.shards, place)
        how = chance.randrange(5)
        if how == 0:
            tell(lie(shards, chance, is_sealed=False))
        elif how == 1:
            tell(lie(shards, chance, is_sealed=True))
        elif how == 2:
            tell(not_finite(shards, chance))
        else:
            tell(harm_file(chance.choice(files_in(shards)), chance))
        if (shards / "index.json").is_dir():
            shutil.rmtree(shards / "index.json")
        if how in (1, 2):
            # whoever seals an index may say what they like; it must be readable or refused
            command("verify", str(shards))
            contents(shards)
            if how == 2:
                raise Wrong("values that are not finite are called as packed")
            return
        if contents(shards) != self.wanted:
            raise Wrong("other samples were read")
        command("verify", str(shards))


def contents(shards: Path) -> list[tuple[str, str, bytes, bytes]]:
    """All that training sees of a folder's samples."""
    reader = ShardReader(shards)
    samples = (reader[number] for number in range(len(reader)))
    return [
        (each.key, each.caption, each.latents.numpy().tobytes(), each.text.numpy().tobytes())
        for each in samples
    ]


def lie(shards: Path, chance: random.Random, is_sealed: bool) -> str:
    """One entry of the index is something else; sealed: as its author would write it."""
    path = shards / "index.json"
    index = json.loads(path.read_text())
    place = index
    names = []
    while isinstance(place, dict | list) and place:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = chance.choice(keys)
        names.append(str(key))
        parent = place
        place = place[key]
        if chance.random() < 0.2:
            break
    junk = chance.choice(JUNK)
    parent[key] = junk
    path.write_text(json.dumps(sealed(index) if is_sealed else index))
    return f"index.json: {'.'.join(names)} is {junk!r}{', sealed' * is_sealed}"


def not_finite(shards: Path, chance: random.Random) -> str:
    """A value that is no number, with checksums and seals that are right."""
    path = shards / "index.json"
    index = json.loads(path.read_text())
    entry = chance.choice(index["samples"])
    name = chance.choice([each for each in entry["members"] if each.endswith(".npy")])
    offset, size, _ = entry["members"][name]
    shard = shards / entry["shard"]
    data = bytearray(shard.read_bytes())
    data[offset + size - 2 : offset + size] = np.float16(chance.choice((np.nan, np.inf))).tobytes()
    shard.write_bytes(data)
    entry["members"][name][2] = zlib.crc32(data[offset : offset + size])
    path.write_text(json.dumps(sealed(index)))
    return f"{entry['shard']}: {name} of {entry['key']} holds a value that is not finite"
