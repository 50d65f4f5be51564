"""diffusers' pipeline over a causal student: a call makes clips, `stream` makes endless video.

It wraps `streaming.StreamSession`, which does the work; nothing of the rollout is repeated here.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from selfforcing_dfd.codecs.text import WanText
from selfforcing_dfd.codecs.wan_vae import TIME, WanCodec
from selfforcing_dfd.common import UserError
from selfforcing_dfd.models.hub import LOCATION, require_student
from selfforcing_dfd.models.identity import Recipe, identity_of
from selfforcing_dfd.models.wan import WanTransformer, is_offloaded
from selfforcing_dfd.streaming.load import latent_size, load_student, student_recipe
from selfforcing_dfd.streaming.load_wan import asked_size, trained_size
from selfforcing_dfd.streaming.model import running_as
from selfforcing_dfd.streaming.open_export import open_to_diffusers
from selfforcing_dfd.streaming.parts import check_fit, check_parts
from selfforcing_dfd.streaming.session import (
    PromptMode,
    StreamChunk,
    StreamModel,
    StreamSession,
    StreamSettings,
)
from selfforcing_dfd.weights.card import ModelFacts, write_model_card
from selfforcing_dfd.weights.sources import read_config

OutputType = Literal["np", "pt", "pil", "uint8"]
Generators = torch.Generator | list[torch.Generator]
OnChunk = Callable[["CausalWanPipeline", StreamChunk], None]


@dataclass
class CausalWanOutput(BaseOutput):
    """frames: one video for each prompt, in the asked type; see `CausalWanPipeline.__call__`."""

    frames: Any


@dataclass(slots=True)
class ChunkStream:
    """An iterator over chunks; `session` makes them, and takes snapshots and new starts."""

    session: StreamSession
    num_chunks: float = math.inf

    def __iter__(self) -> Iterator[StreamChunk]:
        return self

    def __next__(self) -> StreamChunk:
        if self.session.chunk_index >= self.num_chunks:
            raise StopIteration
        return self.session.next_chunk()

    def set_prompt(self, prompt: str, mode: PromptMode | None = None) -> None:
        """Another prompt from the next chunk on."""
        self.session.set_prompt(prompt, mode)


class CausalWanPipeline(DiffusionPipeline):
    """The parts of a pipeline around a causal student.

    transformer: marked as a causal student (`models.identity.mark`), else HubError. scheduler: not
    used here; for others who read the export. LoRA's other methods are on `transformer`. Of
    diffusers' ways of offloading `enable_model_cpu_offload` works. So does `.to(device)`, and `vae`
    and `text_encoder` may be on other devices than the transformer.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"  # type: ignore[assignment]

    transformer: WanTransformer
    vae: Any  # AutoencoderKLWan, which type checkers misread
    text_encoder: UMT5EncoderModel
    tokenizer: PreTrainedTokenizerFast
    scheduler: FlowMatchEulerDiscreteScheduler

    def __init__(
        self,
        transformer: WanTransformer,
        vae: AutoencoderKLWan,
        text_encoder: UMT5EncoderModel,
        tokenizer: PreTrainedTokenizerFast,
        scheduler: FlowMatchEulerDiscreteScheduler,
    ) -> None:
        super().__init__()
        require_student(transformer.config, "the transformer")
        if transformer.takes_picture:
            raise UserError(
                "the transformer is an image-to-video student of Wan2.1, and this pipeline has no "
                "image encoder; stream it with `selfforcing-dfd stream --model WAN_I2V_FOLDER "
                "--weights STUDENT --image FILE`"
            )
        self.register_modules(
            transformer=transformer,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            scheduler=scheduler,
        )
        self._interrupt = False

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[Any],
        student: Path | str = "",
        entry: str = "",
        **kwargs: Any,
    ) -> Self:
        """diffusers' `from_pretrained` for an export of ours, or for Wan with a student.

        student: weights in any format of `weights/read.py`, `entry` the model in them. Wan's own
        transformer is never taken for a student: HubError. LoadError lists the parts that are
        missing, with the commands that fetch them, and parts that do not fit the student.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            location = {key: kwargs[key] for key in LOCATION if key in kwargs}
            without = {"transformer": None} if student else {}  # 5 GB that would not be used
            folder = Path(cls.download(str(pretrained_model_name_or_path), **location, **without))
        if "transformer" not in kwargs:
            if not student:
                require_student(read_config(folder), str(folder))
            check_parts(folder, Path(student) if student else None)
            weights = Path(student) if student else folder / "transformer"
            kwargs["transformer"] = load_student(
                weights, "cpu", _transformer_dtype(kwargs) or torch.float32, entry
            )
        config = kwargs["transformer"].config
        check_fit(config, identity_of(config).data, folder)
        # AutoTokenizer would rebuild a T5Tokenizer and drop what tokenizer.json says about
        # normalisation
        kwargs.setdefault(
            "tokenizer", PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
        )
        kwargs["scheduler"] = export_scheduler(student_recipe(kwargs["transformer"]))
        return super().from_pretrained(folder, **kwargs)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[Any],
        facts: ModelFacts | None = None,
        **options: Any,
    ) -> None:
        """diffusers' `save_pretrained`, a pipeline that needs diffusers alone, and a model card.

        facts: more for the card than the parts say themselves.
        """
        if options.get("push_to_hub"):
            raise UserError(
                "push_to_hub would upload without the model card; save first, then run "
                "hf upload REPOSITORY FOLDER"
            )
        super().save_pretrained(save_directory, **options)
        open_to_diffusers(Path(save_directory), self.recipe)
        data = identity_of(self.transformer.config).data
        facts = facts or ModelFacts(Path(save_directory).name)
        known = dataclasses.replace(
            facts,
            recipe=self.recipe,
            num_parameters=sum(map(torch.numel, self.transformer.parameters())),
            size=None if data is None else trained_size(data),
        )
        write_model_card(Path(save_directory), known)

    def load_lora_weights(self, pretrained_model_name_or_path_or_dict: Any, **options: Any) -> None:
        """An adapter for the transformer; see `LoraMixin.load_lora_adapter`."""
        loader: Any = self.transformer
        loader.load_lora_adapter(pretrained_model_name_or_path_or_dict, **options)

    @property
    def recipe(self) -> Recipe:
        """Ladder, shift, chunk and past that the student was trained for."""
        return student_recipe(self.transformer)

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt` in a callback to end a call after the current chunk."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: Generators | None = None,
        seed: int | None = None,
        output_type: OutputType = "np",
        return_dict: bool = True,
        callback_on_chunk_end: OnChunk | None = None,
        settings: StreamSettings | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
    ) -> CausalWanOutput | tuple[Any]:
        """One clip of num_frames video frames for each prompt, one after the other.

        num_frames, height, width: by default those of the student's training clips. seed: prompt i
        has the noise of the stream with seed + i, the same as in `stream` and inference/stream.py.
        generator: each prompt's seed is one number in [0, 2^63 - 1) drawn from it (or from its own,
        of a list), so that calls in a row differ and a generator seeded anew repeats them; without
        both, drawn from torch's default one. settings: window, sink and positions; their seed is
        replaced. Without them a clip as long as the training clips or shorter sees all of its past,
        and a longer one what `StreamSettings()` says.

        num_inference_steps, guidance_scale and negative_prompt belong to the teacher: the steps are
        the student's ladder, and guidance was distilled into its weights. Other values than the
        student's own are refused.

        frames: np float32 [B, T, H, W, 3] in [0, 1]; pt the same as [B, T, 3, H, W]; pil lists of
        pictures; uint8 a tensor [B, T, H, W, 3]. Raises UserError for values that do not fit.
        """
        if output_type not in get_args(OutputType):
            raise UserError(
                f"output_type is {output_type!r}; use one of {', '.join(get_args(OutputType))}"
            )
        refuse_teacher_options(self.recipe, num_inference_steps, guidance_scale, negative_prompt)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        seeds = prompt_seeds(len(prompts), seed, generator)
        if num_frames is None:
            num_frames = 1 + TIME * (self.recipe.frames - 1)
        model = self.stream_model(height, width)
        num_chunks = self._num_chunks(num_frames)
        settings = settings or self._settings(num_chunks)
        self._interrupt = False
        videos = []
        with self.progress_bar(total=num_chunks * len(prompts)) as bar:
            for text, number in zip(prompts, seeds, strict=True):
                session = StreamSession(model, text, dataclasses.replace(settings, seed=number))
                video = self._clip(ChunkStream(session, num_chunks), bar, callback_on_chunk_end)
                videos.append(video[:num_frames])
                if self._interrupt:
                    break
        self.maybe_free_model_hooks()
        frames = as_output(videos, output_type)
        return CausalWanOutput(frames=frames) if return_dict else (frames,)

    def _clip(self, chunks: ChunkStream, bar: Any, on_chunk: OnChunk | None) -> Tensor:
        """The video frames of all chunks, or of those before an interruption."""
        parts = []
        for chunk in chunks:
            parts.append(chunk.frames)
            bar.update()
            if on_chunk is not None:
                on_chunk(self, chunk)
            if self._interrupt:
                break
        return torch.cat(parts)

    def stream(
        self,
        prompt: str,
        num_chunks: float = math.inf,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        settings: StreamSettings | None = None,
        context: Tensor | None = None,
    ) -> ChunkStream:
        """Endless video in chunks, or `num_chunks` of them; `set_prompt` changes the prompt.

        context: video [T, H, W, 3] in [0, 1] to continue, T = 1 + 4 n. Others as in `__call__`.
        """
        number = prompt_seeds(1, seed, generator)[0]
        settings = dataclasses.replace(settings or StreamSettings(), seed=number)
        session = StreamSession(self.stream_model(height, width), prompt, settings, context)
        return ChunkStream(session, num_chunks)

    def stream_model(self, height: int | None = None, width: int | None = None) -> StreamModel:
        """The parts as a session takes them. Raises LoadError for sizes that do not fit."""
        offloaded = self._execution_device if is_offloaded(self.transformer) else None
        decode_on = offloaded or self.vae.device
        codec = WanCodec(self.vae, channels_last=decode_on.type == "cuda", device=decode_on)
        size = asked_size((height, width), identity_of(self.transformer.config).data)
        return StreamModel(
            student=self.transformer,
            codec=codec,
            text=WanText(self.tokenizer, self.text_encoder),
            latent_size=latent_size(size, codec.strides, self.transformer.patch),
            decode_device=codec.device,
            run_device=offloaded,
            **running_as(self.recipe),
        )

    def _num_chunks(self, num_frames: int) -> int:
        """How many chunks hold that many video frames; the last one may be cut."""
        if num_frames < 1:
            raise UserError(f"num_frames is {num_frames}; want at least one video frame")
        num_latent_frames = 1 + math.ceil((num_frames - 1) / TIME)
        return math.ceil(num_latent_frames / self.recipe.chunk_frames)

    def _settings(self, num_chunks: int) -> StreamSettings:
        """All of the past for clips up to the training length, else endless streams' settings."""
        latent_frames = num_chunks * self.recipe.chunk_frames
        if latent_frames > self.recipe.frames:
            return StreamSettings()
        return StreamSettings(sink_frames=0, window_frames=latent_frames, positions="absolute")


def _transformer_dtype(options: Mapping[str, Any]) -> torch.dtype | None:
    """The transformer's dtype in diffusers' options `dtype` or `torch_dtype`."""
    dtype = options.get("dtype") or options.get("torch_dtype")
    if isinstance(dtype, dict):
        return dtype.get("transformer", dtype.get("default"))
    return dtype


def refuse_teacher_options(
    recipe: Recipe,
    num_inference_steps: int | None,
    guidance_scale: float | None,
    negative_prompt: str | list[str] | None,
) -> None:
    """Raise UserError for options of diffusers' WanPipeline that a student cannot follow."""
    steps = len(recipe.ladder)
    if num_inference_steps not in (None, steps):
        raise UserError(
            f"num_inference_steps is {num_inference_steps}, but this student was distilled to "
            f"{steps} steps, its ladder; leave num_inference_steps out"
        )
    if guidance_scale not in (None, 1):
        raise UserError(
            f"guidance_scale is {guidance_scale}, but guidance was distilled into this student's "
            "weights; leave guidance_scale out"
        )
    if negative_prompt:
        raise UserError(
            "negative_prompt acts through guidance, which was distilled into this student's "
            "weights; leave negative_prompt out"
        )


def export_scheduler(recipe: Recipe) -> FlowMatchEulerDiscreteScheduler:
    """diffusers' scheduler that takes the student's steps.

    They are set by set_timesteps(sigmas=[t / 1000 for t in recipe.ladder]).
    """
    fresh = not recipe.keeps_noise
    return FlowMatchEulerDiscreteScheduler(shift=recipe.shift, stochastic_sampling=fresh)


def prompt_seeds(count: int, seed: int | None, generator: Generators | None) -> list[int]:
    """A seed for each prompt; see `CausalWanPipeline.__call__`.

    Raises UserError for both, and for another number of generators than prompts.
    """
    if seed is not None and generator is not None:
        raise UserError("both seed and generator are given; drop one of them")
    if seed is not None:
        return [seed + i for i in range(count)]
    generators = generator if isinstance(generator, list) else [generator] * count
    if len(generators) != count:
        raise UserError(
            f"{len(generators)} generators for {count} prompts; give one generator, or one for "
            "each prompt"
        )
    return [
        int(torch.randint(2**63 - 1, (), generator=g, device=g.device if g else "cpu"))
        for g in generators
    ]


def as_output(videos: list[Tensor], output_type: OutputType) -> Any:
    """uint8 videos [T, H, W, 3] as the asked type; a list if an interruption cut one of them."""
    if output_type == "pil":
        return [[Image.fromarray(frame) for frame in video.numpy()] for video in videos]
    whole = len({len(video) for video in videos}) == 1
    if output_type == "np":
        arrays = [video.numpy().astype(np.float32) / 255 for video in videos]
        return np.stack(arrays) if whole else arrays
    tensors = videos
    if output_type == "pt":
        tensors = [video.permute(0, 3, 1, 2).float() / 255 for video in videos]
    return torch.stack(tensors) if whole else tensors
