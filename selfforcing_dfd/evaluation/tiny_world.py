"""The tiny world in a report: fresh clips of the data law, read back exactly from pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from selfforcing_dfd import rng
from selfforcing_dfd.common import UserError
from selfforcing_dfd.config import Config
from selfforcing_dfd.evaluation import tiny_verdict
from selfforcing_dfd.evaluation.curves import histogram
from selfforcing_dfd.evaluation.generate import EVALUATION_SEED, Decode, EvaluationSet, Videos
from selfforcing_dfd.evaluation.tables import CONTROL, FEWEST, Finding, Metric, Row, find, stated
from selfforcing_dfd.evaluation.world import Chart, Layout, Measured
from selfforcing_dfd.stages import arms_of, stage_of
from selfforcing_dfd.stages.dfd import DFDConfig, DFDStage
from selfforcing_dfd.tiny.codec import CHANNELS, SPACE, TIME, TinyCodec
from selfforcing_dfd.tiny.metrics import summarise
from selfforcing_dfd.tiny.readout import Reading, read
from selfforcing_dfd.tiny.text import TinyText
from selfforcing_dfd.tiny.world import (
    DIRECTIONS,
    FPS,
    HUES,
    MODE_PRIOR,
    SIDE,
    Factors,
    captions,
    draw_factors,
    parse_caption,
    render,
)
from selfforcing_dfd.training.build_data import codec_file
from selfforcing_dfd.training.sizes import known_sizes

# with fewer clips than modes, the prior that smooths the sample's law dominates it
FEWEST_FOR_MODES = len(MODE_PRIOR)

METRICS = (
    Metric("valid", "validity", 2, 0.3, "share of clips that are one coherent moving shape", 0),
    Metric("modes", "modes of 24", 0, 8, "hues x directions seen among the valid clips", 0),
    Metric(
        "kl_prior_sample",
        "KL(prior || sample)",
        2,
        0.8,
        "nats; what the sample misses of the 24 modes' law",
        FEWEST_FOR_MODES,
    ),
    Metric("agreement_shape", "shape agreement", 2, 0.3, "valid clips that show the caption's"),
    Metric("agreement_hue", "hue agreement", 2, 0.3, "likewise"),
    Metric("agreement_direction", "direction agreement", 2, 0.3, "likewise"),
    Metric("agreement_speed", "speed agreement", 2, 0.3, "likewise"),
    Metric("agreement_size", "size agreement", 2, 0.3, "likewise"),
    Metric("saturation", "saturation", 2, 0.15, "HSV saturation of the shape, valid clips"),
    Metric("contrast", "contrast", 2, 0.2, "RGB distance of shape and background, all clips", 0),
    Metric("speed_px", "speed, px/frame", 2, 0.3, "pixels per video frame, valid clips"),
    Metric(
        "saturation_drift",
        "saturation drift / chunk",
        3,
        0.05,
        "mean size of the change, valid clips",
    ),
    Metric("contrast_drift", "contrast drift / chunk", 3, 0.05, "mean change, valid clips"),
    Metric("jitter_px", "jitter, px", 2, 1.0, "rms distance from a straight track, valid clips"),
    Metric(
        "seam_excess_px",
        "seam excess, px",
        2,
        0.5,
        "how much less even the motion is where chunks meet",
    ),
    Metric("spread", "spread of pixels", 3, 0.04, "standard deviation over clips, all clips", 0),
)

LAYOUT = Layout(
    fps=FPS,
    sample_clips=16,
    sample_columns=4,
    scale=2,
    sheet_clips=8,
    compared_clips=6,
    compared_columns=2,
    max_width=SIDE,
)

GLOSSARY = {
    "mode": "one of 24 pairs of hue and direction; captions name neither here, so all should occur",
    "KL(prior || sample)": "how far the shares of the modes are from the data's law; 0 is equal",
    "validity": "share of clips that show one coherent moving shape",
}

DOSE = (
    "Pairing caption depends on its dose and on what captions leave open. With captions that name "
    "only the shape, it repairs modes in its first handful of updates at falling contrast (8 "
    "updates: validity .97, coverage .44 to .68, contrast -31 %), and at twice that number samples "
    "collapse. This is a statement about dose and loose captions, not about the method."
)


class TinyWorld:
    """`World`: every number is counted on clips whose factors are known."""

    name = "tiny"
    title = "Tiny world"
    metrics: tuple[Metric, ...] = METRICS
    layout = LAYOUT
    glossary: Mapping[str, str] = GLOSSARY
    chart_about = (
        "Share of the valid clips in each of the 24 modes, hue by direction of motion. "
        "The dark ticks are the data's law."
    )

    def decoder(self, config: Config) -> Decode:
        codec = TinyCodec.load(codec_file(config))

        def decode(latents: Tensor) -> Tensor:
            return codec.decode(latents.float().cpu()).clamp(0, 1)

        return decode

    def draw(self, config: Config, num_clips: int) -> EvaluationSet:
        factors = evaluation_factors(num_clips)
        return self._asked(config, captions(factors, config.data.tiny.level))

    def ask(self, config: Config, captions: Sequence[str]) -> EvaluationSet:
        for caption in captions:
            if not parse_caption(caption):
                raise UserError(
                    f"prompt {caption!r} names nothing of the tiny world; "
                    f"try 'a disc moves', or square or cross"
                )
        return self._asked(config, captions)

    def _asked(self, config: Config, captions: Sequence[str]) -> EvaluationSet:
        text = TinyText(text_width(config)).encode(list(captions))
        shape = (config.rollout.frames, CHANNELS, SIDE // SPACE, SIDE // SPACE)
        return EvaluationSet(tuple(captions), text, shape)

    def has_real_clips(self, config: Config) -> bool:
        return True

    def real_clips(self, config: Config, evaluation: EvaluationSet, decode: Decode) -> Videos:
        codec = TinyCodec.load(codec_file(config))
        factors = evaluation_factors(len(evaluation))
        num_frames = 1 + TIME * (evaluation.latent_shape[0] - 1)
        for part in evaluation.batches("data"):
            clips = render(factors[slice(part.start, part.stop)], num_frames)
            yield decode(codec.encode(clips))

    def measure(self, videos: Videos, captions: Sequence[str], chunk_frames: int) -> Measured:
        reading = Reading.join([read(batch, chunk_frames) for batch in videos])
        modes = torch.bincount(reading.mode[reading.valid], minlength=len(MODE_PRIOR))
        return Measured(stated(summarise(reading, captions), METRICS), tuple(modes.tolist()))

    def findings(self, rows: Sequence[Row]) -> list[Finding]:
        return tiny_verdict.findings(rows, METRICS)

    def background(self, config: Config) -> str:
        loose = config.data.tiny.level == "short"
        tied_to_caption = any(ties_to_the_caption(arm) for arm in arms_of(config))
        return DOSE if loose and tied_to_caption else ""

    def notes(self, rows: Sequence[Row], num_clips: int, num_seeds: int = 1) -> list[str]:
        lines = [
            f"{num_clips} independent draws from the prior hit {expected_modes(num_clips):.1f} of "
            f"the 24 modes on average. Means over fewer than {FEWEST} valid clips, and KL from "
            f"fewer than {FEWEST_FOR_MODES}, are not stated."
        ]
        if find(rows, CONTROL):
            lines.append(tiny_verdict.RULE)
        return lines

    def charts(self, rows: Sequence[Row]) -> list[Chart]:
        drawn = []
        for row in rows:
            hit = sum(count > 0 for count in row.modes)
            about = f"{sum(row.modes)} valid clips, {hit} of {len(row.modes)} modes"
            svg = histogram(row.modes, MODE_PRIOR.tolist(), HUES, DIRECTIONS)
            drawn.append(Chart(row.name, about, svg))
        return drawn

    def facts(self, num_clips: int) -> dict[str, Any]:
        return {"expected_modes": expected_modes(num_clips), "mode_prior": MODE_PRIOR.tolist()}


def evaluation_factors(num_clips: int) -> Factors:
    """The factors behind the evaluation set: each clip its own draw from the data law."""
    streams = (rng.generator(EVALUATION_SEED, "evaluation clip", n) for n in range(num_clips))
    return Factors.join([draw_factors(1, stream) for stream in streams])


def expected_modes(num_clips: int) -> float:
    """How many of the 24 modes as many independent draws from the prior hit on average."""
    return float((1 - (1 - MODE_PRIOR.double()) ** num_clips).sum())


def ties_to_the_caption(config: Config) -> bool:
    """Whether a run ties samples to real clips by their caption alone, as in the paper."""
    is_dfd = issubclass(stage_of(config), DFDStage)
    return is_dfd and config.of(DFDConfig).pairing == "caption"


def text_width(config: Config) -> int:
    """The width of the text that the run's networks take."""
    return next(iter(known_sizes(config).values())).text_dim
