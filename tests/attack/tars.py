"""Tars of FastGen and LMDBs of Self-Forcing: every sample is imported as it was, or spoken of.

Neither format holds a checksum of a caption or of an LMDB's values, so changes of these are left
out. Tars have checksums in their headers, and .pth files in them of their content.
"""

from __future__ import annotations

import io
import random
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

from selfforcing_dfd.common import UserError
from selfforcing_dfd.data.shards import ShardReader
from tests.attack.harms import copy, cut, harm_file
from tests.attack.trials import Kind, Tell, Wrong, command
from tests.data.imported_data import PROMPTS, draw, pth, sample, write_lmdb, write_tars

NUM = 4
CONTENTS: tuple[Any, ...] = (b"", b"x", b"\x93NUMPY", b"\x80\x04.", b"PK\x03\x04", b"\0" * 2000)


class Imported(NamedTuple):
    """samples: latents and text, as bytes. said: what the command printed."""

    samples: set[tuple[bytes, bytes]]
    said: str


class Tars(Kind):
    """No sample is lost or changed without a word."""

    name = "tars"

    def prepare(self, folder: Path) -> None:
        texts = [{"txt": PROMPTS[number].encode()} for number in range(NUM)]
        samples = [sample(number, **texts[number]) for number in range(NUM)]
        rows = {number: draw(number) for number in range(NUM)}
        self.sources = [
            write_tars(folder / "tars", samples),
            write_lmdb(folder / "lmdb", rows, PROMPTS),
        ]
        self.wanted = [import_all(each, folder / f"from-{each.name}") for each in self.sources]

    def attack(self, chance: random.Random, place: Path, tell: Tell) -> None:
        kind = int(chance.random() < 0.15)
        source = copy(self.sources[kind], place)
        is_odd = chance.random() < 0.3
        if kind == 1:
            tell(cut_file(source / "data.mdb", chance))
        elif is_odd:
            tell(odd_member(source, chance))
        else:
            tell(harm_file(chance.choice(sorted(source.glob("*.tar"))), chance))
        got = import_all(source, place / "out")
        wanted = self.wanted[kind].samples
        if got.samples - wanted and not (is_odd and wanted <= got.samples):
            raise Wrong(f"a sample was changed without a word: {got.said}")
        tars = sorted(path.name for path in source.glob("*.tar") if path.is_file())
        is_whole = kind == 1 or len(tars) == len(list(self.sources[0].glob("*.tar")))
        if wanted - got.samples and is_whole:
            if "left out" not in got.said:
                raise Wrong(f"samples are missing without a word: {got.said}")
            raise UserError(got.said)


def import_all(source: Path, out: Path) -> Imported:
    text = ["--text", "tiny"] if source.name == "lmdb" else []
    said = command("import", str(source), "--out", str(out), *text)
    command("verify", str(out))
    reader = ShardReader(out)
    samples = [reader[number] for number in range(len(reader))]
    found = {(each.latents.numpy().tobytes(), each.text.numpy().tobytes()) for each in samples}
    return Imported(found, said)


def cut_file(path: Path, chance: random.Random) -> str:
    data = bytearray(path.read_bytes())
    said = cut(data, chance)
    path.write_bytes(data)
    return f"{path.name}: {said}"


def odd_member(folder: Path, chance: random.Random) -> str:
    """A whole tar beside the others with one more sample, which is hardly one."""
    members = sample(9)
    key = members.pop("__key__")
    name = chance.choice((*members, "txt", "json", "neg_txt_emb.pth"))
    content = chance.choice((*CONTENTS, pth({"a": 1}), pth(draw(0)), pth(draw(0)[0])))
    members[name] = content
    kinds = (*(tarfile.REGTYPE,) * 4, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE)
    kind = chance.choice(kinds)
    prefix = chance.choice(("", "../", "/", "a/b/", "./"))
    with tarfile.open(folder / "99999.tar", "w") as tar:
        for part, data in members.items():
            info = tarfile.TarInfo(f"{prefix}{key}.{part}")
            info.size = len(data)
            if part == name and kind != tarfile.REGTYPE:
                info.type = kind
                info.linkname = "../../secret"
                info.size = 0
            tar.addfile(info, io.BytesIO(data[: info.size]))
    return f"a sample more, whose {prefix}{name} of type {kind!r} holds {content[:12]!r}"
