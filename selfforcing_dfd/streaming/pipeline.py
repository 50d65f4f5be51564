"""The usual pipeline of diffusers over a causal student: `__call__` gives clips, `stream` gives
chunks without end.

A thin face on `streaming.StreamSession`, which does the work; nothing of the rollout is repeated
here.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator
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
from selfforcing_dfd.models.hub import LOCATION, Recipe, read_config, recipe_of, require_student
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.streaming.card import ModelFacts, write_model_card
from selfforcing_dfd.streaming.load import check_parts, latent_size, load_student
from selfforcing_dfd.streaming.session import (
    PromptMode,
    StreamChunk,
    StreamModel,
    StreamSession,
    StreamSettings,
)

OutputType = Literal["np", "pt", "pil", "uint8"]
Generators = torch.Generator | list[torch.Generator]
OnChunk = Callable[["CausalWanPipeline", StreamChunk], None]


@dataclass
class CausalWanOutput(BaseOutput):
    """frames: one video for each prompt, in the asked output type; see
    `CausalWanPipeline.__call__`.
    """

    frames: Any


@dataclass(slots=True)
class ChunkStream:
    """An iterator over chunks. `session` is what makes them: a new prompt, a snapshot or another
    start are asked of it.
    """

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
    """transformer: a causal student, marked as one (`models.hub.mark_student`). scheduler: for
    others, who want one.

    Raises HubError for a transformer that does not say that it is a student. LoRA's other methods
    are on `transformer`. The parts are called in ways that diffusers' offloading hooks do not see,
    so it is not offered; `.to(device)` is, and `vae` and `text_encoder` may live on other devices
    than the transformer.
    """

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
        """diffusers' `from_pretrained` for an export of ours; for a repository of Wan with a
        student of its own.

        student: weights in any format of `models/weights.py`, `entry` the model in them. Wan's own
        transformer is never taken for one: HubError. ConfigError lists the parts that are missing,
        with the commands that fetch them.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            location = {key: kwargs[key] for key in LOCATION if key in kwargs}
            without = {"transformer": None} if student else {}  # 5 GB that would not be used
            folder = Path(cls.download(str(pretrained_model_name_or_path), **location, **without))
        if "transformer" not in kwargs:
            if not student:
                require_student(read_config(folder), str(folder))
            check_parts(folder, str(student))
            dtype = kwargs.get("dtype") or kwargs.get("torch_dtype")
            dtype = (
                dtype.get("transformer", dtype.get("default")) if isinstance(dtype, dict) else dtype
            )
            kwargs["transformer"] = load_student(
                student or folder / "transformer", "cpu", dtype or torch.float32, entry
            )
        # AutoTokenizer would rebuild a T5Tokenizer and drop what tokenizer.json says about
        # normalisation
        kwargs.setdefault(
            "tokenizer", PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
        )
        kwargs["scheduler"] = export_scheduler(recipe_of(kwargs["transformer"].config))
        return super().from_pretrained(folder, **kwargs)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[Any],
        facts: ModelFacts | None = None,
        **options: Any,
    ) -> None:
        """diffusers' `save_pretrained`, and a model card made of `facts`, by default of what the
        parts say themselves.
        """
        if options.get("push_to_hub"):
            raise ValueError(
                "save first and push then, so that the model card goes along: hf upload REPOSITORY FOLDER"
            )
        super().save_pretrained(save_directory, **options)
        count = sum(parameter.numel() for parameter in self.transformer.parameters())
        known = facts or ModelFacts(Path(save_directory).name)
        write_model_card(
            Path(save_directory),
            dataclasses.replace(known, recipe=self.recipe, num_parameters=count),
        )

    def load_lora_weights(self, pretrained_model_name_or_path_or_dict: Any, **options: Any) -> None:
        """An adapter for the transformer, by its usual name in diffusers; see
        `HubMixin.load_lora_adapter`.
        """
        loader: Any = self.transformer
        loader.load_lora_adapter(pretrained_model_name_or_path_or_dict, **options)

    @property
    def recipe(self) -> Recipe:
        """Ladder, shift and chunk that the student was trained for."""
        return recipe_of(self.transformer.config)

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt` in a callback to end a call after the chunk at hand."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        num_frames: int = 81,
        height: int = 480,
        width: int = 832,
        generator: Generators | None = None,
        seed: int | None = None,
        output_type: OutputType = "np",
        return_dict: bool = True,
        callback_on_chunk_end: OnChunk | None = None,
        settings: StreamSettings | None = None,
    ) -> CausalWanOutput | tuple[Any]:
        """One clip of num_frames video frames for each prompt, one after the other.

        seed: prompt i has the noise of the stream with seed + i, the same as in `stream` and
        inference/stream.py. generator: each prompt's seed is one number in [0, 2^63 - 1) drawn from
        it (or from its own, of a list), so that calls in a row differ and a generator seeded anew
        repeats them; without both, drawn from torch's default one. settings: window, sink and
        positions; without them a clip as long as the student's training clips or shorter sees all
        of its past, and a longer one what `StreamSettings()` says. Their seed is replaced.

        frames: np float32 [B, T, H, W, 3] in [0, 1]; pt the same as [B, T, 3, H, W]; pil lists of
        pictures; uint8 a tensor [B, T, H, W, 3]. Raises ValueError for sizes that do not fit.
        """
        if output_type not in get_args(OutputType):
            raise ValueError(
                f"output_type is {output_type!r}; use one of {', '.join(get_args(OutputType))}"
            )
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        seeds = prompt_seeds(len(prompts), seed, generator)
        model, num_chunks = self.stream_model(height, width), self._num_chunks(num_frames)
        settings = settings or self._settings(num_chunks)
        self._interrupt = False
        videos = []
        with self.progress_bar(total=num_chunks * len(prompts)) as bar:
            for text, number in zip(prompts, seeds, strict=True):
                session = StreamSession(model, text, dataclasses.replace(settings, seed=number))
                parts = []
                for chunk in ChunkStream(session, num_chunks):
                    parts.append(chunk.frames)
                    bar.update()
                    if callback_on_chunk_end is not None:
                        callback_on_chunk_end(self, chunk)
                    if self._interrupt:
                        break
                videos.append(torch.cat(parts)[:num_frames])
                if self._interrupt:
                    break
        frames = as_output(videos, output_type)
        return CausalWanOutput(frames=frames) if return_dict else (frames,)

    def stream(
        self,
        prompt: str,
        num_chunks: float = math.inf,
        height: int = 480,
        width: int = 832,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        settings: StreamSettings | None = None,
        context: Tensor | None = None,
    ) -> ChunkStream:
        """Chunks of video without end, or `num_chunks` of them. Change the prompt between them with
        `set_prompt`.

        context: video [T, H, W, 3] in [0, 1] to go on from, T = 1 + 4 n. seed, generator: as in
        `__call__`.
        """
        number = prompt_seeds(1, seed, generator)[0]
        settings = dataclasses.replace(settings or StreamSettings(), seed=number)
        return ChunkStream(
            StreamSession(self.stream_model(height, width), prompt, settings, context), num_chunks
        )

    def stream_model(self, height: int, width: int) -> StreamModel:
        """The parts as a session wants them. Raises ConfigError for a height or width that does not
        fit.
        """
        codec = WanCodec(self.vae, channels_last=self.vae.device.type == "cuda")
        size = latent_size((height, width), codec.strides, self.transformer.patch)
        text, recipe = WanText(self.tokenizer, self.text_encoder), self.recipe
        return StreamModel(
            self.transformer, codec, text, recipe.ladder, recipe.chunk_frames, size, codec.device
        )

    def _num_chunks(self, num_frames: int) -> int:
        """How many chunks hold that many video frames; the last one may be cut."""
        if num_frames < 1:
            raise ValueError(f"num_frames is {num_frames}; want at least one video frame")
        num_latent_frames = 1 + math.ceil((num_frames - 1) / TIME)
        return math.ceil(num_latent_frames / self.recipe.chunk_frames)

    def _settings(self, num_chunks: int) -> StreamSettings:
        """All of the past where the student knows so long a one, else what is made for endless
        streams.
        """
        latent_frames = num_chunks * self.recipe.chunk_frames
        if latent_frames > self.recipe.num_frames:
            return StreamSettings()
        return StreamSettings(sink_frames=0, window_frames=latent_frames, positions="absolute")


def export_scheduler(recipe: Recipe) -> FlowMatchEulerDiscreteScheduler:
    """diffusers' scheduler that takes the student's steps, by set_timesteps(sigmas=[t / 1000 for t
    in timesteps]).
    """
    return FlowMatchEulerDiscreteScheduler(shift=recipe.shift, stochastic_sampling=True)


def prompt_seeds(count: int, seed: int | None, generator: Generators | None) -> list[int]:
    """A seed for each prompt; see `CausalWanPipeline.__call__`. Raises ValueError for both, or too
    few generators.
    """
    if seed is not None and generator is not None:
        raise ValueError("both seed and generator are given; drop one of them")
    if seed is not None:
        return [seed + i for i in range(count)]
    generators = generator if isinstance(generator, list) else [generator] * count
    if len(generators) != count:
        raise ValueError(
            f"{len(generators)} generators for {count} prompts; give one generator, or one for each prompt"
        )
    return [
        int(torch.randint(2**63 - 1, (), generator=g, device=g.device if g else "cpu"))
        for g in generators
    ]


def as_output(videos: list[Tensor], output_type: OutputType) -> Any:
    """uint8 videos [T, H, W, 3] as the asked type; a list where an interruption left them with
    different lengths.
    """
    if output_type == "pil":
        return [[Image.fromarray(frame) for frame in video.numpy()] for video in videos]
    whole = len({len(video) for video in videos}) == 1
    if output_type == "np":
        arrays = [video.numpy().astype(np.float32) / 255 for video in videos]
        return np.stack(arrays) if whole else arrays
    tensors = (
        videos
        if output_type == "uint8"
        else [video.permute(0, 3, 1, 2).float() / 255 for video in videos]
    )
    return torch.stack(tensors) if whole else tensors
