"""FastGen's webdataset shards of precomputed latents (`VideoLatentLoaderConfig` and its kin).

    <key>.latent.pth, .latents.npy           [C, F, H, W], Wan's latents, normalised
    <key>.txt_emb.pth, .text_embedding.npy   [L, D], zeros past the prompt's end
    <key>.neg_txt_emb.pth                    in some: the negative prompt's embedding
    <key>.txt, .json                         in some: the caption, or an object that holds it as
                                             `caption` or `prompt`

The negative prompt's embedding is the same in all samples. Otherwise it is a file of its own,
`neg_prompt_emb.npy` or `.pth`.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import tarfile
from functools import cached_property
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any, Literal
from zipfile import ZipFile, is_zipfile

import torch
from torch import Tensor

from selfforcing_dfd.data.format import PackError, from_npy
from selfforcing_dfd.data.source import IMPORTED_CODEC, ClipError, Item, Latents, Source, one_line
from selfforcing_dfd.weights.stored import UNREADABLE

Layout = Literal["cfhw", "fchw"]
Place = tuple[int, int]
"""Offset and size of a member in its tar, in bytes."""

ENDINGS = (".pth", ".pt", ".npy")
LATENTS = ("latent", "latents", "target_latent")
EMBEDDINGS = ("txt_emb", "text_embedding", "text_emb")
NEGATIVES = ("neg_txt_emb", "neg_prompt_emb")
WAN_CHANNELS = 16
NUM_TRIED = 32  # samples looked at for one that tells the shapes
NUM_NAMED = 5
MEGABYTE = 2**20


class FastGenSource(Source):
    """Latents with text embeddings, captions, or both."""

    title = "fastgen"

    def __init__(
        self, path: Path | str, layout: Layout = "cfhw", negative: Path | None = None
    ) -> None:
        """layout: of the stored latents. negative: file of the negative prompt's embedding.

        Raises PackError if there are no tars, if a tar is damaged, if there are no samples with
        latents, or if none of the first samples can be read.
        """
        self.path = Path(path)
        self.layout = layout
        self._tars = [self.path] if self.path.is_file() else sorted(self.path.glob("*.tar"))
        if not self._tars:
            raise PackError(f"{path}: no .tar files in it; want FastGen's webdataset shards")
        self._samples = [
            (tar, key, members) for tar in self._tars for key, members in _members(tar).items()
        ]
        self._negative_file = negative or self._negative_beside()
        self._first = self._first_readable()
        num_frames, num_channels = self.latent_shape[:2]
        if layout == "cfhw" and num_frames == WAN_CHANNELS != num_channels:
            stored = [num_channels, num_frames, *self.latent_shape[2:]]
            raise PackError(
                f"{path}: latents are {stored}, which looks like [F, C, H, W]; "
                "read them with --layout fchw"
            )

    @cached_property
    def names(self) -> list[str]:
        if len(self._tars) == 1:
            return [key for _, key, _ in self._samples]
        return [f"{tar.stem}/{key}" for tar, key, _ in self._samples]

    @cached_property
    def about(self) -> dict[str, Any]:
        sizes = json.dumps([[tar.name, tar.stat().st_size] for tar in self._tars] + [self.names])
        return {
            "kind": "fastgen",
            "num_clips": len(self._samples),
            "layout": self.layout,
            "sha256": hashlib.sha256(sizes.encode()).hexdigest(),
        }

    @property
    def holds(self) -> Latents:
        return Latents(self.latent_shape, IMPORTED_CODEC)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        assert self._first.latents is not None
        return tuple(self._first.latents.shape)

    @property
    def text_shape(self) -> tuple[int, ...] | None:
        return None if self._first.text is None else tuple(self._first.text.shape)

    @cached_property
    def negative(self) -> Tensor | None:
        """PackError if there is one that cannot be read."""
        tar, key, members = self._samples[0]
        name = next((name for name in members if name.rpartition(".")[0] in NEGATIVES), None)
        try:
            if self._negative_file:
                file = self._negative_file.name
                return _matrix(_load(file, self._negative_file.read_bytes()), file)
            if name:
                return _matrix(_load(f"{key}.{name}", _read(tar, members[name])), f"{key}.{name}")
        except ClipError as error:
            raise PackError(str(error)) from error
        return None

    def read(self, number: int) -> Item:
        item = self._read(number)
        assert item.latents is not None
        got = tuple(item.latents.shape)
        if got != self.latent_shape:
            problem = f"its latents are {list(got)}, those of the first sample "
            raise ClipError(self.names[number], f"{problem}{list(self.latent_shape)}")
        return item

    def _read(self, number: int) -> Item:
        """A sample of any shape."""
        tar, _, members = self._samples[number]
        name = self.names[number]
        latents = _array(tar, members, LATENTS, name)
        if latents is None:
            found = ", ".join(sorted(members))
            raise ClipError(name, f"no latent.pth or latents.npy; it has {found}")
        latents = latents.squeeze(0) if latents.ndim == 5 and len(latents) == 1 else latents
        if latents.ndim != 4:
            shape = list(latents.shape)
            raise ClipError(name, f"its latents are {shape}, want four dimensions")
        if not latents.isfinite().all():
            raise ClipError(name, "its latents hold NaN or infinity")
        text = _array(tar, members, EMBEDDINGS, name)
        if text is not None:
            text = _matrix(text, name)
            if not text.isfinite().all():
                raise ClipError(name, "its text embedding holds NaN or infinity")
        if self.layout == "cfhw":
            latents = latents.transpose(0, 1)
        return Item(_caption(tar, members, name), latents=latents.contiguous(), text=text)

    def _negative_beside(self) -> Path | None:
        folder = self.path if self.path.is_dir() else self.path.parent
        paths = [folder / f"{name}{ending}" for name, ending in product(NEGATIVES, ENDINGS)]
        return next((path for path in paths if path.is_file()), None)

    def _first_readable(self) -> Item:
        problems = []
        for number in range(min(NUM_TRIED, len(self._samples))):
            try:
                return self._read(number)
            except ClipError as error:
                problems.append(f"\n  {error}")
        first = "".join(problems[:NUM_NAMED])
        raise PackError(f"{self.path}: none of the first samples can be used:{first}")


def _members(tar: Path) -> dict[str, dict[str, Place]]:
    """Key -> member without the key -> where it lies.

    A file name is split at its first dot, as webdataset does. PackError for a tar that is
    compressed, damaged or cut off: `tarfile` takes a damaged header for the end of the archive.
    """
    found: dict[str, dict[str, Place]] = {}
    try:
        with tarfile.open(tar, "r:") as members:
            for info in members:
                if not info.isfile():
                    continue
                folder, _, file = info.name.rpartition("/")
                key, _, part = file.partition(".")
                full_key = f"{folder}/{key}" if folder else key
                parts = found.setdefault(full_key, {})
                if part in parts:
                    raise PackError(
                        f"{tar}: holds {info.name} twice, and one of the two samples would be "
                        "lost; give each sample a name of its own"
                    )
                parts[part] = (info.offset_data, info.size)
            end = members.offset
    except tarfile.TarError as error:
        raise PackError(
            f"{tar}: cannot be read as an uncompressed tar ({error}); copy it again"
        ) from error
    if not _ends_at(tar, end):
        raise PackError(
            f"{tar}: damaged or cut off at byte {end} of {tar.stat().st_size}, after "
            f"{len(found)} samples; copy it again"
        )
    return found


def _ends_at(tar: Path, end: int) -> bool:
    """Whether a block of zeros and nothing else but zeros follows.

    A header that became zeros looks like the archive's end to `tarfile`.
    """
    with tar.open("rb") as file:
        file.seek(end)
        first = file.read(tarfile.BLOCKSIZE)
        rest = iter(lambda: file.read(MEGABYTE), b"")
        is_empty = not any(piece.strip(b"\0") for piece in (first, *rest))
    return is_empty and len(first) == tarfile.BLOCKSIZE


def _array(
    tar: Path, members: dict[str, Place], wanted: tuple[str, ...], name: str
) -> Tensor | None:
    """The first member with one of the wanted names; None if there is none."""
    accepted = {f"{one}{ending}" for one, ending in product(wanted, ENDINGS)}
    found = next((part for part in members if part in accepted), None)
    return None if found is None else _load(name, _read(tar, members[found]))


def _read(tar: Path, place: Place) -> bytes:
    offset, size = place
    with tar.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _load(name: str, data: bytes) -> Tensor:
    """A tensor from the bytes of a .pth or .npy file, in float32.

    ClipError for anything else, which is never executed.
    """
    try:
        if data.startswith(b"\x93NUMPY"):
            return from_npy(data)
        if is_zipfile(BytesIO(data)):
            _check_zip(name, data)
        loaded = torch.load(BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = one_line(str(error).split("\n")[0])[:120]
        unsafe = (
            "is damaged, or holds Python objects other than tensors, which could run code and are "
            "never loaded"
        )
        raise ClipError(name, f"{unsafe} ({reason})") from error
    except UNREADABLE as error:
        reason = f"{type(error).__name__}: {error}"
        raise ClipError(name, f"cannot be read as .pth or .npy ({reason})") from error
    if not isinstance(loaded, Tensor):
        raise ClipError(name, f"holds {type(loaded).__name__}, want one tensor")
    return loaded.float()


def _check_zip(name: str, data: bytes) -> None:
    """ClipError for a .pth file whose content is not as written, which torch does not look at."""
    with ZipFile(BytesIO(data)) as file:
        bad = file.testzip()
    if bad is not None:
        raise ClipError(name, f"is damaged: the checksum of {bad} in it differs; copy it again")


def _matrix(text: Tensor, name: str) -> Tensor:
    """[L, D], from that or from [1, L, D]."""
    text = text.squeeze(0) if text.ndim == 3 and len(text) == 1 else text
    if text.ndim != 2:
        raise ClipError(name, f"its text embedding is {list(text.shape)}, want [L, D]")
    return text


def _caption(tar: Path, members: dict[str, Place], name: str) -> str:
    """From .txt, else from .json; empty if neither holds one."""
    try:
        if "txt" in members:
            return one_line(_read(tar, members["txt"]).decode("utf-8"))
        about = json.loads(_read(tar, members["json"])) if "json" in members else {}
    except ValueError as error:
        raise ClipError(name, f"its caption cannot be read ({error})") from error
    if not isinstance(about, dict):
        return ""
    found = [about[key] for key in ("caption", "prompt") if isinstance(about.get(key), str)]
    return one_line(found[0]) if found else ""
