"""What streams share: a student, its codec and text encoder, and their sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from selfforcing_dfd.codecs.protocol import Compilable, StreamingCodec
from selfforcing_dfd.models.identity import Recipe
from selfforcing_dfd.models.network import WanNetwork
from selfforcing_dfd.models.picture import Picture
from selfforcing_dfd.rollout import Ladder
from selfforcing_dfd.streaming.ring import KVShape

Calls = Literal["plain", "static", "graph"]
CLEAN = 0.0


def passes_in_words(ladder: Sequence[float], first_ladder: Sequence[float], commits: bool) -> str:
    """`4 steps and a commit pass`; `2 steps (the first chunk 4), no commit pass`."""
    text = f"{len(ladder)} step{'s' * (len(ladder) > 1)}"
    text += f" (the first chunk {len(first_ladder)})" if first_ladder != ladder else ""
    return f"{text} and a commit pass" if commits else f"{text}, no commit pass"


"""The noise level at which finished chunks are committed."""


def running_as(recipe: Recipe) -> dict[str, Any]:
    """What a `StreamModel` takes from a student's recipe."""
    return {
        "ladder": recipe.sigmas,
        "first_ladder": recipe.first_sigmas,
        "chunk_frames": recipe.chunk_frames,
        "keeps_noise": recipe.keeps_noise,
        "commits": recipe.commits,
        "given": recipe.given,
    }


class TextEncoder(Protocol):
    def encode(self, captions: list[str]) -> Tensor:
        """[B, L, D_text], zeros past each prompt's end."""
        ...


@runtime_checkable
class KnowsWords(Protocol):
    """A text encoder that can say which words mean nothing to its student."""

    def unknown_words(self, prompt: str) -> list[str]: ...


@dataclass(frozen=True, slots=True)
class StreamModel:
    """What sessions share: weights and sizes.

    latent_size: rows and columns of the latents. run_device: where the student computes; None is
    where its weights are. decode_device: the codec's device; None is the student's. keeps_noise:
    whether the noise that a chunk starts from stays between its steps.
    given: latent frames at the start of a video that the student does not make (1: a picture).
    first_ladder: the first chunk's, where it differs. commits: whether a finished chunk is run once
    more, clean; else later chunks see it as it was at its last step. calls: how the student is
    called: plainly, in fixed memory, or as CUDA graphs, see `static_calls`.
    see: for a student of Wan2.1-I2V, what it sees of a picture [1, H, W, 3]; see `codecs.pictures`.
    """

    student: WanNetwork
    codec: StreamingCodec
    text: TextEncoder
    ladder: Ladder
    chunk_frames: int
    latent_size: tuple[int, int]
    decode_device: torch.device | None = None
    keeps_noise: bool = False
    given: int = 0
    see: Callable[[Tensor], Picture] | None = None
    run_device: torch.device | None = None
    first_ladder: Ladder | None = None
    commits: bool = True
    calls: Calls = "plain"

    def ladder_of(self, is_first: bool) -> Ladder:
        """The ladder of a video's first chunk, or of the others."""
        return self.first_ladder if is_first and self.first_ladder else self.ladder

    @property
    def passes_in_words(self) -> str:
        """How often the student is asked for a chunk."""
        return passes_in_words(self.ladder, self.ladder_of(True), self.commits)

    @property
    def noise_levels(self) -> tuple[float, ...]:
        """All at which the student is called, each once."""
        every = self.ladder + (self.first_ladder or ())
        if self.commits:
            every += (CLEAN,)
        return tuple(dict.fromkeys(every))

    @property
    def device(self) -> torch.device:
        return self.run_device or self.student.patch_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.student.patch_embedding.weight.dtype

    @property
    def video_size(self) -> tuple[int, int]:
        """Height and width of a video frame."""
        rows, columns = self.latent_size
        _, row_stride, column_stride = self.codec.strides
        return rows * row_stride, columns * column_stride

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of a prompt that the student has never met; none where the encoder cannot say."""
        return self.text.unknown_words(prompt) if isinstance(self.text, KnowsWords) else []

    @property
    def num_given_video_frames(self) -> int:
        """Video frames that a stream cannot begin without."""
        if self.student.takes_picture:
            return 1
        return 1 + self.codec.strides[0] * (self.given - 1) if self.given else 0

    @property
    def num_given_latent_frames(self) -> int:
        return 1 if self.student.takes_picture else self.given

    def compile(self, **options: Any) -> None:
        """Compile the student's blocks, and the decoder of Wan's VAE. options: of torch.compile."""
        self.student.compile_blocks(**options)
        if isinstance(self.codec, Compilable):
            self.codec.compile_decoding(**options)

    def grey(self) -> Tensor | None:
        """A grey beginning for a student that needs one: for measurements, where none is shown."""
        num_frames = self.num_given_video_frames
        return torch.full((num_frames, *self.video_size, 3), 0.5) if num_frames else None

    def kv_shape(self) -> KVShape:
        """Sizes of the keys and values of one latent frame."""
        rows, columns = self.latent_size
        _, patch_rows, patch_columns = self.student.patch
        config = self.student.config
        return KVShape(
            num_layers=config["num_layers"],
            batch=1,
            tokens=(rows // patch_rows) * (columns // patch_columns),
            heads=self.student.own_heads,
            head_dim=config["attention_head_dim"],
        )
