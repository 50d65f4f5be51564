"""The same clip by diffusers' own Wan pipeline: what a stream is compared with.

Both make one clip, with weights of the same size and numbers, the same steps, dtype and machine, in
one process, both warm. diffusers denoises the whole clip at once: bidirectional, without a cache,
with the scheduler that Wan's folders name, and shows its first frame when it has all. The stream
makes it chunk by chunk from the first frame on, commit passes included, each chunk seeing the
stream's sink and window. Neither encodes text, and neither asks without a caption (guidance).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import diffusers
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

from selfforcing_dfd.codecs.wan_vae import WanCodec
from selfforcing_dfd.common import UserError
from selfforcing_dfd.models.identity import SELF_FORCING
from selfforcing_dfd.streaming.session import StreamModel, StreamSession, StreamSettings

TRIALS = 3
PROMPT = "a disc moves"


@dataclass(frozen=True, slots=True)
class ClipTime:
    """Seconds from the call to the first video frame on the host, and to the last one."""

    first_frame_s: float
    clip_s: float


def compare_with_diffusers(
    model: StreamModel, plain: StreamModel, settings: StreamSettings, compiled: bool
) -> dict[str, Any]:
    """Times of a clip of Wan's length by the stream of `model` and by diffusers' loop.

    plain: the same model as it was built, which gives diffusers its weights and its VAE. compiled:
    whether diffusers' blocks are compiled too. Medians of TRIALS clips after a first one. Raises
    UserError for a model without Wan's VAE.
    """
    latent_frames = SELF_FORCING.frames // model.chunk_frames * model.chunk_frames
    video_frames = 1 + model.codec.strides[0] * (latent_frames - 1)
    pipeline = diffusers_pipeline(plain)
    if compiled:
        pipeline.transformer.compile_repeated_blocks(dynamic=False)
    session = StreamSession(model, PROMPT, settings)
    num_chunks = latent_frames // model.chunk_frames
    text = plain.text.encode([PROMPT]).to(plain.device, plain.dtype)
    times = in_turn(
        {
            "stream": lambda: streamed_clip(session, num_chunks),
            "diffusers": lambda: pipeline_clip(pipeline, plain, text, video_frames),
        },
        model.device,
    )
    return {
        "video_frames": video_frames,
        "steps": len(model.ladder),
        "trials": TRIALS,
        "diffusers_version": diffusers.__version__,
        "scheduler": type(pipeline.scheduler).__name__,
        "diffusers_compiled": compiled,
        **{side: figures(measured, video_frames) for side, measured in times.items()},
    }


def diffusers_pipeline(plain: StreamModel) -> Any:
    """diffusers' pipeline around a model's weights and VAE, without a text encoder.

    The weights are shared, not copied. Raises UserError for a codec that diffusers does not have.
    """
    codec = plain.codec
    if not isinstance(codec, WanCodec):
        raise UserError(
            f"--baseline needs Wan's VAE, this model has {type(codec).__name__}; "
            "measure a model of Wan, such as --random-weights wan1.3b"
        )
    sizes = {name: plain.student.config[name] for name in SIZE_NAMES}
    with torch.device("meta"):
        transformer: Any = WanTransformer3DModel(**sizes)
    transformer.load_state_dict(plain.student.state_dict(), assign=True)
    # rotary tables are no weights, so they were not loaded
    transformer.rope = type(transformer.rope)(
        sizes["attention_head_dim"], plain.student.patch, transformer.config.rope_max_seq_len
    )
    for name, module in transformer.named_modules():
        if name.rpartition(".")[2] in transformer._keep_in_fp32_modules:
            module.float()  # as from_pretrained leaves them
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SELF_FORCING.shift
    )
    pipeline: Any = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        transformer=transformer.eval().requires_grad_(False),
        vae=codec.vae,
        scheduler=scheduler,
    )
    pipeline.to(plain.device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


SIZE_NAMES = (
    *("num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "text_dim"),
    *("freq_dim", "ffn_dim", "num_layers"),
)
"""WanTransformer's arguments that are also diffusers'."""


def streamed_clip(session: StreamSession, num_chunks: int) -> ClipTime:
    """A new stream under the prompt that is encoded already, to the last frame of its chunks."""
    started = time.perf_counter()
    session.reset()
    before_s = time.perf_counter() - started
    first_ms = session.next_chunk().timings.first_frame_ms
    for _ in range(num_chunks - 1):
        session.next_chunk()
    return ClipTime(before_s + first_ms / 1000, time.perf_counter() - started)


def pipeline_clip(
    pipeline: Any, plain: StreamModel, text: torch.Tensor, video_frames: int
) -> ClipTime:
    """The whole clip by diffusers; its frames are on the host, as numpy, when the call returns."""
    height, width = plain.video_size
    started = time.perf_counter()
    pipeline(
        prompt_embeds=text,
        height=height,
        width=width,
        num_frames=video_frames,
        num_inference_steps=len(plain.ladder),
        guidance_scale=1.0,
        output_type="np",
    )
    clip_s = time.perf_counter() - started
    return ClipTime(clip_s, clip_s)


def in_turn(
    sides: Mapping[str, Callable[[], ClipTime]], device: torch.device
) -> dict[str, list[ClipTime]]:
    """TRIALS clips of each side after one that warms up; the device is idle before each of them.

    Side by side, since a machine's pace changes with the minute.
    """
    times: dict[str, list[ClipTime]] = {side: [] for side in sides}
    for trial in range(TRIALS + 1):
        for side, make in sides.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            measured = make()
            if trial:
                times[side].append(measured)
    return times


def figures(times: list[ClipTime], video_frames: int) -> dict[str, float]:
    """Medians of one side's clips: seconds, frames a second, milliseconds to the first frame."""
    clip_s = median(trial.clip_s for trial in times)
    return {
        "clip_s": clip_s,
        "fps": video_frames / clip_s,
        "first_frame_ms": 1000 * median(trial.first_frame_s for trial in times),
    }
