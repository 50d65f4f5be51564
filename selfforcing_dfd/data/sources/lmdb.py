"""LMDB data sets of Self-Forcing, DFD, CausVid and Causal-Forcing.

One environment, or a folder of several, each with the keys

    latents_shape        ASCII numbers: N [S] F C H W
    latents_<i>_data     float16 [S] F C H W, raw bytes
    prompts_<i>_data     UTF-8

S is there in data of trajectories: S latents from noise to clean. Latents are Wan's, normalised.
`prompts_shape` and, for image to video, `img_<i>_data` are not read.
"""

from __future__ import annotations

import hashlib
import math
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfforcing_dfd.data.format import PackError
from selfforcing_dfd.data.source import IMPORTED_CODEC, ClipError, Item, Latents, Source, one_line

SHAPE = b"latents_shape"
DATA_FILE = "data.mdb"


def find_environments(path: Path) -> list[Path]:
    """A folder or file that is an environment; else the environments directly in it, by name."""
    if path.is_file() or (path / DATA_FILE).is_file():
        return [path]
    return sorted(found.parent for found in path.glob(f"*/{DATA_FILE}"))


class LmdbSource(Source):
    """Latents with prompts. step: which latent of a trajectory; by default its clean end."""

    title = "lmdb"

    def __init__(
        self, path: Path | str, step: int = -1, row_shape: tuple[int, ...] | None = None
    ) -> None:
        """row_shape: [S] F C H W where latents_shape lacks it.

        Scripts leave it out whose last file held nothing new. Raises PackError if there is no
        environment, no `lmdb` package or no such step, or if shapes are missing or disagree.
        """
        self.path = Path(path)
        self.step = step
        paths = find_environments(self.path)
        if not paths:
            raise PackError(
                f"{path}: no LMDB here; want a folder with {DATA_FILE}, or with such folders"
            )
        self._environments = [_open(found) for found in paths]
        shapes = [_shape(*both) for both in zip(paths, self._environments, strict=True)]
        self._folders = [found.name for found in paths]
        self._rows = [
            (number, row) for number, shape in enumerate(shapes) for row in range(shape[0])
        ]
        self._row_shape = row_shape or self._common_row_shape(shapes)
        if not -self.num_steps <= step < self.num_steps:
            raise PackError(
                f"--step {step}: a sample of {path} has {self.num_steps} latents, "
                f"0 to {self.num_steps - 1} or -1"
            )

    @property
    def num_steps(self) -> int:
        return self._row_shape[0] if len(self._row_shape) == 5 else 1

    @property
    def holds(self) -> Latents:
        return Latents(self.latent_shape, IMPORTED_CODEC)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self._row_shape[-4:]

    @cached_property
    def names(self) -> list[str]:
        """`row-000012`, with the environment's name before it where there are several."""
        if len(self._environments) == 1:
            return [f"row-{row:06d}" for _, row in self._rows]
        return [f"{self._folders[number]}/row-{row:06d}" for number, row in self._rows]

    @cached_property
    def about(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for name, (number, row) in zip(self.names, self._rows, strict=True):
            with self._environments[number].begin() as transaction:
                prompt = transaction.get(f"prompts_{row}_data".encode()) or b""
                digest.update(f"{name}\n".encode() + prompt + b"\n")
        return {
            "kind": "lmdb",
            "num_clips": len(self._rows),
            "row": "x".join(map(str, self._row_shape)),
            "step": self.step % self.num_steps,
            "sha256": digest.hexdigest(),
        }

    def read(self, number: int) -> Item:
        name = self.names[number]
        environment, row = self._rows[number]
        with self._environments[environment].begin(buffers=True) as transaction:
            data = transaction.get(f"latents_{row}_data".encode())
            prompt = transaction.get(f"prompts_{row}_data".encode())
            for kind, found in (("latents", data), ("prompts", prompt)):
                if found is None:
                    raise ClipError(name, f"no {kind}_{row}_data in the LMDB")
            latents = self._latents(name, data)
            try:
                caption = one_line(bytes(prompt).decode("utf-8"))
            except UnicodeDecodeError as error:
                raise ClipError(name, f"its prompt is not UTF-8 ({error.reason})") from error
        return Item(caption, latents=latents)

    def _latents(self, name: str, data: memoryview) -> Tensor:
        """[F, C, H, W] float32 from a row's bytes."""
        wanted = 2 * math.prod(self._row_shape)
        if len(data) != wanted:
            shape = " ".join(map(str, self._row_shape))
            problem = f"latents have {len(data)} bytes, want {wanted} for float16 {shape}"
            raise ClipError(name, problem)
        steps = np.frombuffer(data, np.float16).reshape(-1, *self.latent_shape)
        latents = steps[self.step].astype(np.float32)
        if not np.isfinite(latents).all():
            raise ClipError(name, "its latents hold NaN or infinity")
        return torch.from_numpy(latents)

    def _common_row_shape(self, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
        rows = {shape[1:] for shape in shapes}
        row = rows.pop()
        if rows or len(row) not in (4, 5):
            named = zip(self._folders, shapes, strict=True)
            stated = "; ".join(f"{folder}: {' '.join(map(str, shape))}" for folder, shape in named)
            raise PackError(
                f"{self.path}: latents_shape is {stated}; want the same N [S] F C H W everywhere. "
                "Name the shape of a row with --row-shape, such as 21x16x60x104, if the script "
                "that wrote it ended on a file with nothing new"
            )
        return row


def _open(path: Path) -> Any:
    """Read-only and without a lock file, so that the folder may be read-only too."""
    try:
        import lmdb
    except ImportError as error:
        raise PackError(
            "reading LMDB data sets needs the package lmdb: pip install lmdb"
        ) from error
    try:
        environment = lmdb.open(
            str(path),
            readonly=True,
            lock=False,
            readahead=False,
            meminit=False,
            subdir=path.is_dir(),
        )
    except lmdb.Error as error:
        raise PackError(f"{path}: cannot be opened as LMDB ({error}); copy it again") from error
    file = path / DATA_FILE if path.is_dir() else path
    wanted = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    got = file.stat().st_size
    if got < wanted:  # reading a mapped file beyond its end would kill this process
        raise PackError(f"{file}: has {got:,} bytes, want at least {wanted:,}; copy it again")
    return environment


def _shape(path: Path, environment: Any) -> tuple[int, ...]:
    """N [S] F C H W of one environment."""
    with environment.begin() as transaction:
        stated = transaction.get(SHAPE)
        keys = [
            bytes(key).decode(errors="replace")
            for key in islice(transaction.cursor().iternext(values=False), 3)
        ]
    if stated is None:
        found = ", ".join(keys) or "no keys at all"
        raise PackError(f"{path}: no key {SHAPE.decode()}, which is written last; it has {found}")
    try:
        return tuple(int(size) for size in stated.decode().split())
    except ValueError as error:
        raise PackError(
            f"{path}: {SHAPE.decode()} is {stated!r}, want numbers N [S] F C H W"
        ) from error
