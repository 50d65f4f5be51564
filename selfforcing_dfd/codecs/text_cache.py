"""Embeddings of prompts kept on disk, so that a text encoder is loaded for new prompts only."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from selfforcing_dfd.codecs.prompts import TextError, check_captions, clean_prompt
from selfforcing_dfd.codecs.protocol import TextEncoder
from selfforcing_dfd.common import atomic_file

logger = logging.getLogger(__name__)


class CachedText:
    """A text encoder that keeps its embeddings in a folder, one file for each prompt.

    The key is the SHA-256 of the encoder's fingerprint and the cleaned prompt. Each prompt is
    encoded by itself, so that its bits depend on no other. Several processes may share the folder.
    Files leave out the zeros past a prompt's end. Returns float32 on the CPU.
    """

    def __init__(
        self,
        encoder: TextEncoder | Callable[[], TextEncoder],
        folder: Path | str,
        fingerprint: str = "",
        keeps: bool = True,
    ) -> None:
        """encoder: or a function that makes it, called for the first prompt that has no file.

        fingerprint: of an encoder that is made later; TextError if it is missing. keeps: whether
        such an encoder stays in memory, or is made anew for the next prompt that has no file.
        """
        self._keeps = keeps
        self._load = encoder if callable(encoder) else lambda: encoder
        self._lock = threading.Lock()
        self.folder = Path(folder)
        self.fingerprint = fingerprint or ("" if callable(encoder) else encoder.fingerprint)
        if not self.fingerprint:
            raise TextError(
                "an encoder that is loaded later needs its fingerprint now; see folder_fingerprint"
            )

    @cached_property
    def encoder(self) -> TextEncoder:
        """Raises TextError if its fingerprint is not the one that the cache was opened for."""
        loaded = self._load()
        if loaded.fingerprint != self.fingerprint:
            raise TextError(
                f"the text encoder is {loaded.fingerprint}, the cache was opened for "
                f"{self.fingerprint}; open it with the fingerprint of the encoder that is loaded"
            )
        return loaded

    def load(self) -> None:
        """Make the encoder now and not at the first new prompt. Raises as `encoder` does.

        Does nothing where it would not stay.
        """
        with self._lock:
            _ = self.encoder if self._keeps else None

    def encode(self, captions: list[str]) -> Tensor:
        """[B, L, D_text] float32 on the CPU, zeros past each prompt's end."""
        check_captions(captions)
        found: dict[str, Tensor] = {}
        # the encoder cleans by itself: cleaning twice would decode entities four times
        for caption in captions:
            prompt = clean_prompt(caption)
            if prompt not in found:
                cached = read_entry(self.path(prompt), prompt)
                found[prompt] = self._compute(caption, prompt) if cached is None else cached
        return torch.stack([found[clean_prompt(caption)] for caption in captions])

    def path(self, prompt: str) -> Path:
        """The file of a cleaned prompt, whether it exists or not."""
        key = hashlib.sha256(f"{self.fingerprint}\n{prompt}".encode()).hexdigest()
        return self.folder / key[:2] / f"{key}.safetensors"

    def _compute(self, caption: str, prompt: str) -> Tensor:
        with self._lock:  # one thread encodes and writes at a time
            try:
                states = self.encoder.encode([caption])[0].float().cpu()
                write_entry(self.path(prompt), states, prompt)
            finally:
                if not self._keeps:
                    self._free()
        return states

    def _free(self) -> None:
        """Forget the encoder, and give its memory on a GPU back to whoever needs it."""
        vars(self).pop("encoder", None)  # where a cached property is, once it was asked for
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def read_entry(path: Path, prompt: str) -> Tensor | None:
    """[L, D_text] float32 from a cache file; None if it is missing or, with a warning, broken."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            rows = file.get_tensor("text")
        if (about["sha256"], about["prompt"]) != (digest_of(rows), prompt):
            raise TextError("its contents are not what was written")
        return pad(rows.float(), (0, 0, 0, int(about["length"]) - len(rows)))
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        logger.warning(
            "%s is damaged (%s: %s); the prompt is encoded again", path, type(error).__name__, error
        )
        return None


def write_entry(path: Path, states: Tensor, prompt: str) -> None:
    """Write states [L, D_text] to a cache file, in bfloat16 where that is exact."""
    used = states.ne(0).any(-1).nonzero()
    rows = states[: int(used.max()) + 1 if len(used) else 0]
    rows = rows.bfloat16() if rows.bfloat16().float().equal(rows) else rows
    about = {"prompt": prompt, "length": str(len(states)), "sha256": digest_of(rows)}
    with atomic_file(path) as partial:
        save_file({"text": rows.contiguous()}, partial, about)


def digest_of(rows: Tensor) -> str:
    return hashlib.sha256(rows.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
