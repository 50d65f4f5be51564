"""What the user asks of a journey, and where its results lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from selfforcing_dfd.data.sources.files import FileSource

Method = Literal["stable", "noised_real"]
MakeSource = Callable[[int, tuple[int, int], bool], FileSource]
"""(video frames of a clip, height and width, whether to cut) -> the clips.

Without cutting, each file is one clip, and no file is read.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One journey.

    clips: what reads the videos, see `MakeSource`. model: a diffusers folder of Wan2.1 with VAE and
    text encoder; None for the tiny world. causal, teacher, fake: weights that the recipe needs;
    empty for those that the journey finds or makes. causal_updates, fake_updates: of the runs that
    make them; None for the recipe's own. samples: clips that are generated to be measured. gpus:
    that the budget is for. overrides: settings of the runs, as `train` takes them.
    """

    videos: Path
    out: Path
    clips: MakeSource
    model: Path | None = None
    method: Method = "stable"
    causal: str = ""
    teacher: str = ""
    fake: str = ""
    causal_updates: int | None = None
    fake_updates: int = 100
    samples: int = 64
    size: tuple[int, int] | None = None
    device: str = "auto"
    workers: int = 2
    gpus: int = 1
    push_to: str = ""
    private: bool = False
    overrides: tuple[str, ...] = ()

    @property
    def shards(self) -> Path:
        return self.out / "shards"

    @property
    def text_cache(self) -> Path:
        """Embeddings of captions, which a further journey can use again."""
        return self.out / "text"

    @property
    def configs(self) -> Path:
        """A config of each training run, ready for `train` on several GPUs."""
        return self.out / "configs"

    @property
    def samples_folder(self) -> Path:
        return self.out / "samples"

    @property
    def evaluation(self) -> Path:
        return self.out / "evaluation.json"

    @property
    def exported(self) -> Path:
        return self.out / "export"
