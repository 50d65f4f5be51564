"""Prompts without clips, which are enough for DMD and for the teacher's pairs."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

from selfforcing_dfd.data.format import PackError
from selfforcing_dfd.data.source import Item, Latents, Source, one_line


class PromptSource(Source):
    """The lines of a UTF-8 text file, a prompt each, without blank ones."""

    batch_size = 16

    def __init__(self, path: Path, latent_shape: tuple[int, ...]) -> None:
        """latent_shape: F, C, H, W of what is to be generated. Raises PackError without prompts."""
        self.path = path
        self._latent_shape = latent_shape
        self._prompts = read_prompts(path)

    @property
    def title(self) -> str:
        return self.path.name

    @property
    def holds(self) -> Latents:
        return Latents(self._latent_shape, "none: prompts without clips")

    @cached_property
    def names(self) -> list[str]:
        return [f"line {line}" for line, _ in self._prompts]

    @property
    def keys(self) -> list[str]:
        return [f"prompt{number:07d}" for number in range(len(self._prompts))]

    @cached_property
    def about(self) -> dict[str, Any]:
        digest = hashlib.sha256("\n".join(prompt for _, prompt in self._prompts).encode())
        return {"num_prompts": len(self._prompts), "sha256": digest.hexdigest()}

    def read(self, number: int) -> Item:
        return Item(self._prompts[number][1])


def read_prompts(path: Path) -> list[tuple[int, str]]:
    """Line number, from 1, and prompt of each line that is not blank. PackError: no prompts."""
    if not path.is_file():
        raise PackError(f"{path}: no such file; want a text file with a prompt on each line")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise PackError(f"{path} is not UTF-8 ({error.reason}); save it as UTF-8") from error
    prompts = [(number, one_line(line)) for number, line in enumerate(lines, 1)]
    found = [(number, prompt) for number, prompt in prompts if prompt]
    if not found:
        raise PackError(f"{path} holds no prompts; want one on each line")
    return found
