"""A protocol on this machine: its prompts, its methods, and which of them cannot be run here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selfforcing_dfd.common import find_file
from selfforcing_dfd.metrics.video import METRICS_VERSION
from selfforcing_dfd.protocol.exact import is_exact
from selfforcing_dfd.protocol.folder import Folder
from selfforcing_dfd.protocol.methods import Method
from selfforcing_dfd.protocol.plan import (
    VIDEOS,
    Cell,
    Prompt,
    Protocol,
    load_protocol,
    missing_prompts,
    prompts_of,
)
from selfforcing_dfd.protocol.videos import encoder_of
from selfforcing_dfd.streaming.load import tiny_codec_file
from selfforcing_dfd.tiny.codec import TIME


@dataclass(slots=True)
class Prepared:
    """not_run: why methods cannot be run. no_features: why encoders cannot be used."""

    name: str
    protocol: Protocol
    folder: Folder
    prompts: list[Prompt]
    not_run: dict[str, str] = field(default_factory=dict)
    no_features: dict[str, str] = field(default_factory=dict)
    described: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)

    def method(self, name: str, prompt_set: str) -> Method:
        return Method(name, self.protocol.methods[name], self.protocol, prompt_set)

    def cells(self, method: str) -> list[Cell]:
        """All videos of a method in order, none where it cannot be run."""
        if method in self.not_run:
            return []
        return self._cells(method)

    def _cells(self, method: str) -> list[Cell]:
        seeds = self.protocol.seeds
        return [Cell(method, prompt, seed) for prompt in self.prompts for seed in seeds]

    def find_missing(self) -> None:
        """Note which methods and encoders cannot be used, and why."""
        lacking = missing_prompts(self.protocol)
        for name in self.protocol.methods:
            cells = self._cells(name)
            sets = dict.fromkeys(prompt.set for prompt in self.prompts)
            reasons = [self.method(name, each).missing(cells) for each in sets]
            why = lacking or next((reason for reason in reasons if reason), "")
            if why:
                self.not_run[name] = why
        for text in self.protocol.features:
            folders = [part.partition("=")[2] for part in text.split("+") if "=" in part]
            absent = [folder for folder in folders if not Path(folder).is_dir()]
            if absent:
                self.no_features[text] = f"no folder {absent[0]}"

    @property
    def encoders(self) -> list[str]:
        """Those that can be used, as the plan names them."""
        return [text for text in self.protocol.features if text not in self.no_features]

    def is_made_here(self, method: str) -> bool:
        return self.protocol.methods[method].kind != VIDEOS

    def video(self, cell: Cell) -> Path:
        """Where the video is, or will be."""
        if self.is_made_here(cell.method):
            return self.folder.video(cell)
        return self.method(cell.method, cell.prompt.set).file(cell)

    def made(self, cell: Cell) -> dict[str, Any]:
        """All that the video depends on. Weights and codec are named by hash, not by place."""
        key = (cell.method, cell.prompt.set)
        if key not in self.described:
            method = self.method(*key)
            about = method.described()
            if method.weights:
                about["weights"] = self.folder.hash_of(find_file(method.weights))
                about["codec"] = self.folder.hash_of(codec_of(method))
            if self.is_made_here(cell.method):
                about["encoder"] = encoder_of(self.protocol.crf)
            self.described[key] = about
        own: dict[str, Any] = {"prompt": cell.prompt.text, "seed": cell.seed}
        if cell.prompt.image:
            own["image"] = self.folder.hash_of(find_file(cell.prompt.image))
        return self.described[key] | own

    def measuring(self) -> dict[str, Any]:
        """All that the numbers of a video depend on, beside the video."""
        frames = self.protocol.chunk_frames
        return {
            "metrics": METRICS_VERSION,
            "fps": self.protocol.fps,
            "chunk": TIME * frames,
            "first_chunk": 1 + TIME * (frames - 1),
            "window_s": self.protocol.window_s,
            "exact": is_exact(self.protocol),
        }


def codec_of(method: Method) -> Path:
    """The file of the tiny codec, or the folder of Wan's VAE."""
    if method.plan.model:
        return find_file(method.plan.model) / "vae"
    return tiny_codec_file(find_file(method.weights))


def prepare(name: str) -> Prepared:
    """The protocol of that name. Raises ConfigError for one that is wrong."""
    protocol = load_protocol(name)
    prompts = [] if missing_prompts(protocol) else prompts_of(protocol)
    prepared = Prepared(name, protocol, Folder(Path(protocol.out)), prompts)
    prepared.find_missing()
    return prepared
