"""What can happen to files: flipped bits, cuts, zeros, other content, nothing left."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

BLOCK = 512
ABSURD = (
    *("", "x", "-1", "0", "1", "2", "3", "-0.5", "0.5", "1e-300", "1e30", "-1e30", "nan", "inf"),
    *("-inf", str(2**63), str(-(2**70)), "1" * 400, "null", "true", "[]", "[1]", "[1,2,3]", "{}"),
    *("{a: 1}", "[nan]", "[1000,0]", "'\\0'", "größer", "../..", "/dev/null", "~", "!!python/x 1"),
    *("${run.seed}", "${missing}", "???", "0x10", "1_000", "2026-11-22", "\t", "[[[]]]", "'" * 3),
)
"""Values that stand where a setting is expected."""


def flip_bit(data: bytearray, chance: random.Random) -> str:
    place = chance.randrange(len(data))
    bit = chance.randrange(8)
    data[place] ^= 1 << bit
    return f"bit {bit} of byte {place} flipped"


def change_bytes(data: bytearray, chance: random.Random) -> str:
    number = chance.randint(1, min(16, len(data)))
    place = chance.randrange(len(data) - number + 1)
    data[place : place + number] = chance.randbytes(number)
    return f"{number} bytes at {place} random"


def zero_block(data: bytearray, chance: random.Random) -> str:
    place = BLOCK * chance.randrange(1 + len(data) // BLOCK)
    end = min(place + BLOCK, len(data))
    data[place:end] = bytes(end - place)
    return f"zeros from {place} to {end}"


def cut(data: bytearray, chance: random.Random) -> str:
    end = chance.randrange(len(data))
    if chance.random() < 0.5:
        end -= end % BLOCK
    del data[end:]
    return f"cut after {end} bytes"


def drop_block(data: bytearray, chance: random.Random) -> str:
    place = BLOCK * chance.randrange(1 + len(data) // BLOCK)
    del data[place : place + BLOCK]
    return f"without the {BLOCK} bytes at {place}"


def repeat_block(data: bytearray, chance: random.Random) -> str:
    place = BLOCK * chance.randrange(1 + len(data) // BLOCK)
    data[place:place] = data[place : place + BLOCK]
    return f"the {BLOCK} bytes at {place} twice"


def append(data: bytearray, chance: random.Random) -> str:
    number = chance.choice((1, BLOCK, 10_240))
    data += bytes(number) if chance.random() < 0.5 else chance.randbytes(number)
    return f"{number} bytes more at the end"


def nothing(data: bytearray, chance: random.Random) -> str:
    del data[:]
    return "empty"


def other(data: bytearray, chance: random.Random) -> str:
    data[:] = chance.randbytes(len(data))
    return "other content of the same size"


Harm = Callable[[bytearray, random.Random], str]
BYTES: tuple[Harm, ...] = (
    *(flip_bit, flip_bit, flip_bit, change_bytes, zero_block, cut, cut, drop_block, repeat_block),
    *(append, nothing, other),
)


def harm_content(path: Path, chance: random.Random) -> str:
    """Change the bytes of a file, and say how. Equal content may come out of it."""
    data = bytearray(path.read_bytes())
    said = chance.choice(BYTES)(data, chance) if data else append(data, chance)
    path.write_bytes(data)
    return f"{path.name}: {said}"


def harm_file(path: Path, chance: random.Random) -> str:
    """Change a file's bytes, or put something else, or nothing, in its place."""
    how = chance.randrange(12)
    if how > 3:
        return harm_content(path, chance)
    path.unlink()
    if how == 0:
        return f"{path.name}: deleted"
    if how == 1:
        path.mkdir()
        return f"{path.name}: a folder in its place"
    if how == 2:
        path.symlink_to(path.name)
        return f"{path.name}: a link to itself"
    path.symlink_to("/nowhere/at/all")
    return f"{path.name}: a link to nothing"


def files_in(folder: Path) -> list[Path]:
    """All files below a folder, by name."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def copy(source: Path, place: Path) -> Path:
    """A folder's copy in another."""
    return Path(shutil.copytree(source, place / source.name, symlinks=True))
