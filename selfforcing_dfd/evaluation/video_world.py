"""Any other video in a report: basics that need no weights, held against the data's clips.

They show a collapse (grey, blurred, frozen or equal clips); they do not judge quality.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from selfforcing_dfd.common import DTYPES, UserError, find_device, find_file
from selfforcing_dfd.config import Config, require
from selfforcing_dfd.data.order import SampleOrder, picture_of
from selfforcing_dfd.data.shards import ShardReader
from selfforcing_dfd.evaluation.generate import Decode, EvaluationSet, GoOn, Videos
from selfforcing_dfd.evaluation.tables import (
    DATA,
    Finding,
    Metric,
    Row,
    Run,
    described,
    find,
    stated,
)
from selfforcing_dfd.evaluation.world import Chart, Layout, Measured, refuse_given
from selfforcing_dfd.metrics.appearance import luma
from selfforcing_dfd.tiny.bootstrap import Resamples, Score, spread
from selfforcing_dfd.training.build_data import open_shards

FPS = 16  # of Wan2.1

METRICS = (
    Metric("saturation", "saturation", 3, 0.15, "max - min over colours, mean over pixels"),
    Metric("contrast", "contrast", 3, 0.1, "standard deviation of luma in a frame"),
    Metric("sharpness", "sharpness", 4, 0.02, "rms difference of luma in neighbouring pixels"),
    Metric("motion", "motion", 4, 0.05, "mean absolute difference of frames four apart"),
    Metric("spread", "spread of pixels", 3, 0.1, "standard deviation over clips"),
)

LAYOUT = Layout(
    fps=FPS,
    sample_clips=4,
    sample_columns=2,
    scale=1,
    sheet_clips=4,
    compared_clips=2,
    compared_columns=1,
    max_width=208,
)


class VideoWorld:
    """`World`: captions and text come from the shards, videos from a diffusers folder's VAE."""

    name = "video"
    title = "Video"
    metrics: tuple[Metric, ...] = METRICS
    layout = LAYOUT
    glossary: Mapping[str, str] = {}
    chart_about = ""

    def decoder(self, config: Config) -> Decode:
        from selfforcing_dfd.codecs.wan_vae import WanCodec

        folder = find_file(config.report.model or config.weights.teacher)
        require(
            (folder / "vae").is_dir(),
            f"a report decodes its clips with a VAE, and {folder} has no folder vae; set "
            f"report.model to a diffusers folder of Wan2.1, or report.clips=0",
        )
        device = find_device(config.run.device, "run.device")
        codec = WanCodec.from_pretrained(folder, device, DTYPES[config.model.compute])

        def decode(latents: Tensor) -> Tensor:
            return codec.decode(latents.float().to(device)).clamp(0, 1).cpu()

        return decode

    def draw(self, config: Config, num_clips: int) -> EvaluationSet:
        reader = open_shards(config)
        seed = config.report.seed
        samples = [reader[number] for number in chosen(reader, num_clips, seed)]
        text = torch.stack([sample.text for sample in samples])
        drawn = self._asked(reader, [sample.caption for sample in samples], text, seed)
        shown = [sample.picture for sample in samples if sample.picture is not None]
        if shown:
            drawn = dataclasses.replace(drawn, picture=picture_of(shown))
        if not config.rollout.given:
            return drawn
        given = torch.stack([sample.latents[: config.rollout.given] for sample in samples])
        return dataclasses.replace(drawn, given=given)

    def ask(self, config: Config, captions: Sequence[str]) -> EvaluationSet:
        refuse_given(config)
        reader = open_shards(config)
        number_of = {caption: number for number, caption in enumerate(reader.captions)}
        for caption in captions:
            if caption not in number_of:
                raise UserError(
                    f"{config.data.shards} holds no text for {caption!r}; ask for one of its "
                    f"captions, or use inference/stream.py, which encodes any prompt"
                )
        text = torch.stack([reader[number_of[caption]].text for caption in captions])
        return self._asked(reader, captions, text, config.report.seed)

    def _asked(
        self, reader: ShardReader, captions: Sequence[str], text: Tensor, seed: int
    ) -> EvaluationSet:
        shape = reader.index.latent_shape
        return EvaluationSet(tuple(captions), text, shape, seed, reader.negative, batch=1)

    def has_real_clips(self, config: Config) -> bool:
        return open_shards(config).has_clips

    def real_clips(self, config: Config, evaluation: EvaluationSet, decode: Decode) -> Videos:
        reader = open_shards(config)
        numbers = chosen(reader, len(evaluation), evaluation.seed)
        for part in evaluation.batches(DATA):
            latents = [reader[number].latents for number in numbers[part.start : part.stop]]
            yield decode(torch.stack(latents))

    def measure(self, videos: Videos, captions: Sequence[str], chunk_frames: int) -> Measured:
        batches = [(clip_statistics(batch), sparse_pixels(batch)) for batch in videos]
        pixels = torch.cat([pixels for _, pixels in batches])
        every = Resamples.draw(len(pixels), seed=0)
        scores = {}
        for key in batches[0][0]:
            values = torch.cat([statistics[key] for statistics, _ in batches])
            scores[key] = every.score(every.mean(values), 0)
        scores["spread"] = every.score(spread(pixels, every), 0)
        return Measured(stated(scores, METRICS))

    def follow(
        self, config: Config, evaluation: EvaluationSet, decode: Decode, go_on: GoOn
    ) -> dict[str, Score]:
        return {}

    def findings(self, rows: Sequence[Row]) -> list[Finding]:
        return described(rows, METRICS) if find(rows, DATA) else []

    def headline(self, rows: Sequence[Row], num_clips: int, num_runs: int = 1) -> str:
        return ""  # these numbers show a collapse; none of them sums up a row

    def verdict(self, runs: Sequence[Run]) -> list[Finding]:
        return []

    def background(self, config: Config) -> str:
        return ""

    def notes(self, rows: Sequence[Row], num_runs: int = 1) -> list[str]:
        return [
            "These numbers need no weights. They show a collapse: grey, blurred, frozen or equal "
            "clips. They do not judge quality or whether a clip shows its caption."
        ]

    def charts(self, rows: Sequence[Row]) -> list[Chart]:
        return []

    def facts(self) -> dict[str, Any]:
        return {}


def chosen(reader: ShardReader, num_clips: int, seed: int) -> list[int]:
    """Samples of the shards in an order that is the same for every run with this seed."""
    order = SampleOrder(len(reader), seed)
    return [order.sample_at(position) for position in range(num_clips)]


def clip_statistics(videos: Tensor) -> dict[str, Tensor]:
    """Each clip's numbers [B] by metric, of videos [B, T, H, W, 3] in [0, 1]; see METRICS."""
    frames = videos[:, ::4].float()  # one video frame of each latent frame
    grey = luma(frames)
    # squares, because blur does not change the sum of absolute differences across an edge
    across = grey.diff(dim=3).square().mean(dim=(1, 2, 3))
    down = grey.diff(dim=2).square().mean(dim=(1, 2, 3))
    return {
        "saturation": (frames.amax(-1) - frames.amin(-1)).mean(dim=(1, 2, 3)),
        "contrast": grey.flatten(2).std(dim=2).mean(dim=1),
        "sharpness": ((across + down) / 2).sqrt(),
        "motion": frames.diff(dim=1).abs().mean(dim=(1, 2, 3, 4)),
    }


def sparse_pixels(videos: Tensor) -> Tensor:
    """A fixed sparse sample of each clip's values, [B, n], for the spread over clips."""
    steps = [max(1, size // 16) for size in videos.shape[2:4]]
    return videos[:, :: max(1, videos.shape[1] // 2), :: steps[0], :: steps[1]].flatten(1)
