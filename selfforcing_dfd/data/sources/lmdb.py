"""LMDB data sets of Self-Forcing, DFD, CausVid and Causal-Forcing.

One environment, or a folder of several, each with the keys

    latents_shape        ASCII numbers: N [S] F C H W; S latents of a trajectory from noise to
      clean, where there are any
    latents_<i>_data     float16 [S] F C H W, raw bytes
    prompts_<i>_data     UTF-8

(`prompts_shape` and, for image to video, `img_<i>_data` are not read.) Latents are Wan's,
normalised.
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

from selfforcing_dfd.data.imports import Imported
from selfforcing_dfd.data.sources.files import PackError, one_line
from selfforcing_dfd.data.sources.video import ClipError

SHAPE, DATA_FILE = b"latents_shape", "data.mdb"


def find_environments(source: Path) -> list[Path]:
    """LMDB environments of a folder in order of name: itself, or those directly in it; or a
    single-file one.
    """
    if source.is_file() or (source / DATA_FILE).is_file():
        return [source]
    return sorted(path.parent for path in source.glob(f"*/{DATA_FILE}"))


class LmdbSource:
    """`imports.ImportSource`. step: which latent of a trajectory; the default is its end, the clean
    one.
    """

    text_shape: tuple[int, ...] | None = None
    negative: Tensor | None = None

    def __init__(
        self, source: Path | str, step: int = -1, row_shape: tuple[int, ...] | None = None
    ) -> None:
        """row_shape: [S] F C H W where latents_shape lacks it, as scripts leave it whose last file
        held nothing new.

        PackError: no environment, no `lmdb` package, shapes that say nothing or disagree, or a step
        that there is not.
        """
        self.source, self.step = Path(source), step
        paths = find_environments(self.source)
        if not paths:
            raise PackError(
                f"{source}: no LMDB here; want a folder with {DATA_FILE}, or with such folders"
            )
        self._environments = [_open(path) for path in paths]
        sizes = [
            _shape(path, environment)
            for path, environment in zip(paths, self._environments, strict=True)
        ]
        self._rows = [(number, row) for number, size in enumerate(sizes) for row in range(size[0])]
        self._folders = [path.name for path in paths]
        shapes = {row_shape or size[1:] for size in sizes}
        self._row_shape = shapes.pop()
        if shapes or len(self._row_shape) not in (4, 5):
            stated = "; ".join(
                f"{path.name}: {' '.join(map(str, s))}"
                for path, s in zip(paths, sizes, strict=True)
            )
            raise PackError(
                f"{source}: latents_shape is {stated}; want the same N [S] F C H W everywhere. Name the shape of a row with "
                "--row-shape, such as 21x16x60x104, if the script that wrote it ended on a file with nothing new"
            )
        num_steps = self.num_steps
        if not -num_steps <= step < num_steps:
            raise PackError(
                f"--step {step}: a sample of {source} has {num_steps} latents, 0 to {num_steps - 1} or -1"
            )

    @property
    def num_steps(self) -> int:
        return self._row_shape[0] if len(self._row_shape) == 5 else 1

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self._row_shape[-4:]

    @cached_property
    def names(self) -> list[str]:
        """`row-000012`, with the environment's name before it where there are several."""
        several = len(self._environments) > 1
        return [
            (f"{self._folders[number]}/" if several else "") + f"row-{row:06d}"
            for number, row in self._rows
        ]

    @cached_property
    def about(self) -> dict[str, Any]:
        digest, shape = hashlib.sha256(), "x".join(map(str, self._row_shape))
        for name, (environment, row) in zip(self.names, self._rows, strict=True):
            with self._environments[environment].begin() as transaction:
                digest.update(
                    f"{name}\n".encode()
                    + (transaction.get(f"prompts_{row}_data".encode()) or b"")
                    + b"\n"
                )
        read = {"row": shape, "step": self.step % self.num_steps, "sha256": digest.hexdigest()}
        return {"kind": "lmdb", "num_clips": len(self._rows), **read}

    def read(self, number: int) -> Imported:
        name, (environment, row) = self.names[number], self._rows[number]
        with self._environments[environment].begin(buffers=True) as transaction:
            data, prompt = (
                transaction.get(f"{kind}_{row}_data".encode()) for kind in ("latents", "prompts")
            )
            if data is None or prompt is None:
                raise ClipError(
                    f"{name}: no {'latents' if data is None else 'prompts'}_{row}_data in the LMDB"
                )
            if len(data) != (wanted := 2 * math.prod(self._row_shape)):
                shape = " ".join(map(str, self._row_shape))
                raise ClipError(
                    f"{name}: latents have {len(data)} bytes, want {wanted} for float16 {shape}"
                )
            latents = (
                np.frombuffer(data, np.float16)
                .reshape(-1, *self.latent_shape)[self.step]
                .astype(np.float32)
            )
            try:
                caption = one_line(bytes(prompt).decode("utf-8"))
            except UnicodeDecodeError as error:
                raise ClipError(f"{name}: its prompt is not UTF-8 ({error.reason})") from error
        if not np.isfinite(latents).all():
            raise ClipError(f"{name}: its latents hold NaN or infinity")
        return Imported(torch.from_numpy(latents), caption)


def _open(path: Path) -> Any:
    """Read-only and without a lock file, so that the folder may be read-only too."""
    try:
        import lmdb
    except ImportError as error:
        raise PackError(
            "reading LMDB data sets needs the package lmdb: pip install lmdb"
        ) from error
    try:
        return lmdb.open(
            str(path),
            readonly=True,
            lock=False,
            readahead=False,
            meminit=False,
            subdir=path.is_dir(),
        )
    except lmdb.Error as error:
        raise PackError(f"{path}: cannot be opened as LMDB ({error}); copy it again") from error


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
