"""What a stream is asked for, what it gives, and what it remembers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from torch import Tensor

from selfforcing_dfd.codecs.protocol import Decoder
from selfforcing_dfd.common import UserError
from selfforcing_dfd.context import Conditioning
from selfforcing_dfd.models.prepared import PreparedConditioning
from selfforcing_dfd.streaming.latency import Timings
from selfforcing_dfd.streaming.ring import Positions, RingState

PromptMode = Literal["recache", "flush", "keep"]
"""What a new prompt does to the context. recache: the visible chunks are committed again under the
new prompt (LongLive, arXiv 2509.22622). flush: all chunks but the sink and the newest one are
forgotten (arXiv 2511.20649). keep: the context stays, and the new prompt takes effect slowly.
"""


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """How one session runs.

    Sizes are in latent frames. window_frames counts history and the current chunk; the sink comes
    on top. Raises UserError for an unknown on_prompt.
    """

    seed: int = 0
    sink_frames: int = 3
    window_frames: int = 9
    positions: Positions = "sink_relative"
    on_prompt: PromptMode = "recache"

    def __post_init__(self) -> None:
        if self.on_prompt not in get_args(PromptMode):
            raise UserError(
                f"on_prompt is {self.on_prompt!r}; use one of {', '.join(get_args(PromptMode))}"
            )


class StreamChunk(NamedTuple):
    """One chunk of video.

    frames: uint8 [T, H, W, 3] on the host. With chunks of three latent frames, T is 9 in a stream's
    first chunk and then 12.
    """

    chunk_index: int
    frames: Tensor
    timings: Timings


@dataclass(frozen=True, slots=True)
class PromptChange:
    """A prompt that is encoded and takes effect at the next chunk."""

    prompt: str
    conditioning: PreparedConditioning
    mode: PromptMode


class Seen(NamedTuple):
    """A chunk that the next one sees, as it was when its keys and values were made.

    start: its first latent frame. sigma: 0 after a commit pass; else the noise level of its last
    step, by frame [B, F] where some frames were given.
    """

    start: int
    latents: Tensor
    sigma: Tensor | float


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All state of a session between two chunks."""

    ring: RingState
    decoder: Decoder
    history: tuple[Seen, ...]
    pending: tuple[Tensor, Conditioning] | None
    given: Tensor | None
    conditioning: PreparedConditioning
    prompt: str
    change: PromptChange | None
    settings: StreamSettings
    chunk_index: int
