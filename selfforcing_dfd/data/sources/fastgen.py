"""FastGen's webdataset shards of precomputed latents (`VideoLatentLoaderConfig` and its kin).

    <key>.latent.pth, .latents.npy   [C, F, H, W], Wan's latents, normalised
    <key>.txt_emb.pth, .text_embedding.npy   [L, D], zeros past the prompt's end
    <key>.neg_txt_emb.pth            in some: the negative prompt's embedding, the same in all
      samples
    <key>.txt, .json                 in some: the caption, or an object with `caption` or `prompt`

The negative prompt's embedding is a file of its own otherwise, `neg_prompt_emb.npy` or `.pth`.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import tarfile
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from selfforcing_dfd.data.imports import Imported
from selfforcing_dfd.data.sources.files import PackError, one_line
from selfforcing_dfd.data.sources.video import ClipError

Layout = Literal["cfhw", "fchw"]

ENDINGS = (".pth", ".pt", ".npy")
LATENTS = ("latent", "latents", "target_latent")
EMBEDDINGS = ("txt_emb", "text_embedding", "text_emb")
NEGATIVES = ("neg_txt_emb", "neg_prompt_emb")
WAN_CHANNELS = 16
NUM_TRIED = 32  # samples looked at for one that tells the shapes


class FastGenSource:
    """`imports.ImportSource`. layout: of the stored latents; negative: file of the negative
    prompt's embedding.
    """

    def __init__(
        self, source: Path | str, layout: Layout = "cfhw", negative: Path | None = None
    ) -> None:
        """PackError: no tars, no samples with latents in them, or none of the first that can be
        read.
        """
        self.source, self.layout = Path(source), layout
        self._tars = [self.source] if self.source.is_file() else sorted(self.source.glob("*.tar"))
        if not self._tars:
            raise PackError(f"{source}: no .tar files in it; want FastGen's webdataset shards")
        self._samples = [
            (tar, key, members) for tar in self._tars for key, members in _members(tar).items()
        ]
        self._negative_file = negative or self._beside()
        self._first = self._first_readable()
        num_frames, num_channels, *_ = self.latent_shape
        if layout == "cfhw" and num_frames == WAN_CHANNELS != num_channels:
            got = list(self._first.latents.transpose(0, 1).shape)
            raise PackError(
                f"{source}: latents are {got}, which looks like [F, C, H, W]; read them with --layout fchw"
            )

    @cached_property
    def names(self) -> list[str]:
        several = len(self._tars) > 1
        return [(f"{tar.stem}/" if several else "") + key for tar, key, _ in self._samples]

    @cached_property
    def about(self) -> dict[str, Any]:
        sizes = json.dumps([[tar.name, tar.stat().st_size] for tar in self._tars] + [self.names])
        digest = hashlib.sha256(sizes.encode()).hexdigest()
        return {
            "kind": "fastgen",
            "num_clips": len(self._samples),
            "layout": self.layout,
            "sha256": digest,
        }

    @property
    def latent_shape(self) -> tuple[int, ...]:
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
                return _matrix(_load(self._negative_file.name, self._negative_file.read_bytes()))
            return (
                None if name is None else _matrix(_load(f"{key}.{name}", _read(tar, members[name])))
            )
        except ClipError as error:
            raise PackError(str(error)) from error

    def read(self, number: int) -> Imported:
        sample = self._read(number)
        if tuple(sample.latents.shape) != self.latent_shape:
            got, wanted = list(sample.latents.shape), list(self.latent_shape)
            raise ClipError(
                f"{self.names[number]}: its latents are {got}, those of the first sample {wanted}"
            )
        return sample

    def _read(self, number: int) -> Imported:
        tar, _, members = self._samples[number]
        name = self.names[number]
        latents = self._array(tar, members, LATENTS, name)
        if latents is None:
            raise ClipError(
                f"{name}: no latent.pth or latents.npy; it has {', '.join(sorted(members))}"
            )
        latents = latents.squeeze(0) if latents.ndim == 5 and len(latents) == 1 else latents
        if latents.ndim != 4:
            raise ClipError(f"{name}: its latents are {list(latents.shape)}, want four dimensions")
        text = self._array(tar, members, EMBEDDINGS, name)
        caption = _caption(
            {part: _read(tar, members[part]) for part in ("txt", "json") if part in members}, name
        )
        text = None if text is None else _matrix(text)
        latents = latents.transpose(0, 1) if self.layout == "cfhw" else latents
        if not latents.isfinite().all():
            raise ClipError(f"{name}: its latents hold NaN or infinity")
        return Imported(latents.contiguous(), caption, text)

    def _array(
        self, tar: Path, members: dict[str, tuple[int, int]], wanted: tuple[str, ...], name: str
    ) -> Tensor | None:
        found = next(
            (
                part
                for part in members
                if part in {w + ending for w in wanted for ending in ENDINGS}
            ),
            None,
        )
        return None if found is None else _load(name, _read(tar, members[found]))

    def _beside(self) -> Path | None:
        folder = self.source if self.source.is_dir() else self.source.parent
        return next(
            (p for name in NEGATIVES for e in ENDINGS if (p := folder / f"{name}{e}").is_file()),
            None,
        )

    def _first_readable(self) -> Imported:
        problems = []
        for number in range(min(NUM_TRIED, len(self._samples))):
            try:
                return self._read(number)
            except ClipError as error:
                problems.append(f"\n  {error}")
        raise PackError(
            f"{self.source}: none of the first samples can be used:{''.join(problems[:5])}"
        )


def _members(tar: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Key -> member without the key -> offset and size, split at the first dot of the file name, as
    webdataset does.
    """
    found: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(tar, "r:") as members:
            for info in members:
                if info.isfile():
                    folder, _, file = info.name.rpartition("/")
                    key, _, part = file.partition(".")
                    found.setdefault(f"{folder}/{key}" if folder else key, {})[part] = (
                        info.offset_data,
                        info.size,
                    )
    except tarfile.TarError as error:
        raise PackError(
            f"{tar}: cannot be read as an uncompressed tar ({error}); copy it again"
        ) from error
    return found


def _read(tar: Path, place: tuple[int, int]) -> bytes:
    with tar.open("rb") as file:
        file.seek(place[0])
        return file.read(place[1])


def _load(name: str, data: bytes) -> Tensor:
    """A tensor from the bytes of a .pth or .npy file, in float32. ClipError for anything else,
    which is never executed.
    """
    try:
        if data.startswith(b"\x93NUMPY"):
            return torch.from_numpy(np.load(io.BytesIO(data), allow_pickle=False)).float()
        loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split("\n")[0].split())[:120]
        unsafe = "is damaged, or holds Python objects other than tensors, which could run code and are never loaded"
        raise ClipError(f"{name}: {unsafe} ({reason})") from error
    except (ValueError, EOFError, RuntimeError, TypeError) as error:
        raise ClipError(
            f"{name}: cannot be read as .pth or .npy ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(loaded, Tensor):
        raise ClipError(f"{name}: holds {type(loaded).__name__}, want one tensor")
    return loaded.float()


def _matrix(text: Tensor) -> Tensor:
    """[L, D], from that or from [1, L, D]."""
    text = text.squeeze(0) if text.ndim == 3 and len(text) == 1 else text
    if text.ndim != 2:
        raise ClipError(f"text embedding: is {list(text.shape)}, want [L, D]")
    return text


def _caption(parts: dict[str, bytes], name: str) -> str:
    """From .txt, else from .json; empty if neither says anything."""
    try:
        if "txt" in parts:
            return one_line(parts["txt"].decode("utf-8"))
        about = json.loads(parts.get("json", b"{}"))
    except ValueError as error:
        raise ClipError(f"{name}: its caption cannot be read ({error})") from error
    found = [
        about[key]
        for key in ("caption", "prompt")
        if isinstance(about, dict) and isinstance(about.get(key), str)
    ]
    return one_line(found[0]) if found else ""
