"""The tiny world in a report: fresh clips of the data law, read back exactly from pixels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from selfforcing_dfd import rng
from selfforcing_dfd.common import UserError
from selfforcing_dfd.config import Config
from selfforcing_dfd.evaluation import tiny_verdict
from selfforcing_dfd.evaluation.curves import Group, share_chart
from selfforcing_dfd.evaluation.follow import compare_clips
from selfforcing_dfd.evaluation.generate import Decode, EvaluationSet, GoOn, Videos
from selfforcing_dfd.evaluation.headline import counted
from selfforcing_dfd.evaluation.tables import (
    CONTROLS,
    FEWEST,
    Finding,
    Metric,
    Row,
    Run,
    interval,
    number,
    stated,
)
from selfforcing_dfd.evaluation.world import Chart, Layout, Measured, refuse_given
from selfforcing_dfd.stages import arms_of, stage_of
from selfforcing_dfd.stages.dfd import DFDConfig, DFDStage
from selfforcing_dfd.tiny.bootstrap import Score
from selfforcing_dfd.tiny.codec import CHANNELS, SPACE, TIME, TinyCodec
from selfforcing_dfd.tiny.metrics import SHARES, summarise
from selfforcing_dfd.tiny.readout import Reading, read
from selfforcing_dfd.tiny.text import TinyText
from selfforcing_dfd.tiny.world import (
    DIRECTION_PRIOR,
    FPS,
    HUE_PRIOR,
    MODE_PRIOR,
    SIDE,
    SPEED_PRIOR,
    Factors,
    Level,
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
    Metric("modes", "modes of 72", 0, 20, "hue x direction x speed among the moving clips", 0),
    Metric("coverage", "coverage", 2, 0.4, "modes / what as many draws of the data hit", 0),
    Metric(
        "kl_prior_sample",
        "KL(prior || sample)",
        2,
        1.0,
        "nats; what all clips miss of the 72 modes' law",
        FEWEST_FOR_MODES,
    ),
    Metric("kl_hue", "KL of hue", 2, 0.3, "likewise, hue alone", FEWEST_FOR_MODES),
    Metric("kl_direction", "KL of direction", 2, 0.3, "likewise, direction", FEWEST_FOR_MODES),
    Metric("kl_speed", "KL of speed", 2, 0.3, "likewise, class of speed", FEWEST_FOR_MODES),
    Metric("valid", "validity", 2, 0.3, "share of clips that are one coherent moving shape", 0),
    Metric("moving", "moving", 2, 0.3, "share of clips that are valid and have a direction", 0),
    Metric("follow", "goes on", 2, 0.5, "chunks after a real first one that go on as it began"),
    Metric("follow_direction", "goes on, direction", 2, 0.5, "in the real direction"),
    Metric("follow_hue", "goes on, hue", 2, 0.5, "in the real hue"),
    Metric("follow_speed", "goes on, speed / real", 2, 0.5, "mean over mean, valid chunks"),
    Metric("follow_speed_slowly", "of slow clips", 2, 0.5, "likewise"),
    Metric("follow_speed_steadily", "of steady clips", 2, 0.5, "likewise"),
    Metric("follow_speed_quickly", "of quick clips", 2, 0.5, "likewise", 1),
    Metric("agreement_shape", "shape agreement", 2, 0.3, "valid clips that show the caption's"),
    Metric("agreement_hue", "hue agreement", 2, 0.3, "likewise"),
    Metric("agreement_direction", "direction agreement", 2, 0.3, "likewise"),
    Metric("agreement_speed", "speed agreement", 2, 0.3, "likewise"),
    Metric("agreement_size", "size agreement", 2, 0.3, "likewise"),
    Metric("saturation", "saturation", 2, 0.15, "HSV saturation of the shape, valid clips"),
    Metric("contrast", "contrast", 2, 0.2, "RGB distance of shape and background, all clips", 0),
    Metric("speed_px", "speed, px/frame", 2, 0.3, "pixels per video frame, valid clips"),
    Metric("saturation_drift", "saturation drift", 3, 0.05, "mean size of change a chunk"),
    Metric("contrast_drift", "contrast drift", 3, 0.05, "mean change a chunk, valid clips"),
    Metric("jitter_px", "jitter, px", 2, 1.0, "rms distance from a straight track, valid clips"),
    Metric("seam_excess_px", "seam excess, px", 2, 0.5, "how much less even motion is at seams"),
    Metric("spread", "spread of pixels", 3, 0.04, "standard deviation over clips, all clips", 0),
)

KINDS = "kinds of motion (colour, direction and speed)"  # modes, in the report's first sentence

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
    "mode": (
        "one of 72 combinations of hue, direction and speed; a short caption names none of them, "
        "so all should occur. Only a clip that moves is in a mode"
    ),
    "coverage": "modes that occur, over those that as many clips of the data show on average",
    "KL(prior || sample)": "how far the shares of the modes are from the data's law",
    "validity": "share of clips that show one coherent moving shape",
    "goes on": (
        "the follow test: a clip begins with a real first chunk; the share of later chunks that "
        "keep its direction, its hue and, within 25 %, its speed"
    ),
}

DOSE = (
    "Pairing caption depends on its dose and on what captions leave open. With captions that name "
    "only the shape, real clips enter as their mean, which is grey, and contrast falls with every "
    "update. This is a statement about dose and loose captions, not about the method."
)


class TinyWorld:
    """`World`: every number is counted on clips whose factors are known."""

    name = "tiny"
    title = "Tiny world"
    metrics: tuple[Metric, ...] = METRICS
    layout = LAYOUT
    glossary: Mapping[str, str] = GLOSSARY
    chart_about = (
        "Shares of hues among valid clips, of directions among moving clips, and of speeds among "
        "valid clips. The ticks are the data's law."
    )

    def decoder(self, config: Config) -> Decode:
        codec = TinyCodec.load(codec_file(config))

        def decode(latents: Tensor) -> Tensor:
            return codec.decode(latents.float().cpu()).clamp(0, 1)

        return decode

    def draw(self, config: Config, num_clips: int) -> EvaluationSet:
        factors = evaluation_factors(num_clips, config.report.seed)
        drawn = self._asked(config, captions(factors, caption_level(config)))
        if not config.rollout.given:
            return drawn
        clips = real_latents(config, drawn, range(num_clips))
        return dataclasses.replace(drawn, given=clips[:, : config.rollout.given])

    def ask(self, config: Config, captions: Sequence[str]) -> EvaluationSet:
        refuse_given(config)
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
        return EvaluationSet(tuple(captions), text, shape, config.report.seed)

    def has_real_clips(self, config: Config) -> bool:
        return True

    def real_clips(self, config: Config, evaluation: EvaluationSet, decode: Decode) -> Videos:
        for part in evaluation.batches("data"):
            yield decode(real_latents(config, evaluation, part))

    def measure(self, videos: Videos, captions: Sequence[str], chunk_frames: int) -> Measured:
        reading = Reading.join([read(batch, chunk_frames) for batch in videos])
        modes = torch.bincount(reading.mode[reading.moving], minlength=len(MODE_PRIOR))
        return Measured(stated(summarise(reading, captions), METRICS), tuple(modes.tolist()))

    def follow(
        self, config: Config, evaluation: EvaluationSet, decode: Decode, go_on: GoOn
    ) -> dict[str, Score]:
        if config.rollout.frames == config.rollout.chunk_frames:
            return {}  # nothing comes after the first chunk
        some = evaluation.first(config.report.follow_clips)
        real = real_latents(config, some, range(len(some)))
        videos = go_on(some, real, decode)
        return stated(compare_clips(videos, real, decode, config.rollout.chunk_frames), METRICS)

    def findings(self, rows: Sequence[Row]) -> list[Finding]:
        return tiny_verdict.findings(rows, METRICS)

    def headline(self, rows: Sequence[Row], num_clips: int, num_runs: int = 1) -> str:
        return counted(rows, "modes", KINDS, num_clips, num_runs)

    def verdict(self, runs: Sequence[Run]) -> list[Finding]:
        return tiny_verdict.verdict(runs)

    def background(self, config: Config) -> str:
        loose = caption_level(config) == "short"
        tied_to_caption = any(ties_to_the_caption(arm) for arm in arms_of(config))
        return DOSE if loose and tied_to_caption else ""

    def notes(self, rows: Sequence[Row], num_runs: int = 1) -> list[str]:
        lines = [
            f"Means over fewer than {FEWEST} valid clips, and KL from fewer than "
            f"{FEWEST_FOR_MODES} clips, are not stated."
        ]
        floor = rows[0].scores.get("kl_floor")
        if floor is not None:
            lines.append(
                f"KL depends on the number of clips, which is the same in all rows: as many draws "
                f"from the data's law have {number(floor.value, 2)} {interval(floor, 2)}."
            )
        if num_runs > 1 and any(row.name in CONTROLS for row in rows):
            lines.append(tiny_verdict.RULE)
        return lines

    def charts(self, rows: Sequence[Row]) -> list[Chart]:
        drawn = []
        for row in rows:
            hit = sum(count > 0 for count in row.modes)
            about = f"{sum(row.modes)} moving clips, {hit} of {len(row.modes)} modes"
            drawn.append(Chart(row.name, about, share_chart(groups_of(row))))
        return drawn

    def facts(self) -> dict[str, Any]:
        return {"mode_prior": MODE_PRIOR.tolist()}


def groups_of(row: Row) -> list[Group]:
    """The row's shares of hues, directions and speeds, beside the data's law."""
    laws = {
        "hue": HUE_PRIOR.tolist(),
        "direction": DIRECTION_PRIOR.tolist(),
        "pace": [0.0, *SPEED_PRIOR.tolist()],
    }
    groups = []
    for kind, names in SHARES.items():
        shares = [row.scores[f"share_{name}"].value for name in names]
        groups.append(Group(names, shares, laws[kind]))
    return groups


def caption_level(config: Config) -> Level:
    """How much the captions say that a run is trained with."""
    packed = config.data.tiny.level
    return config.data.captions or ("long" if packed == "all" else packed)


def evaluation_factors(num_clips: int, seed: int) -> Factors:
    """The factors behind the evaluation set: each clip its own draw from the data law."""
    streams = (rng.generator(seed, "evaluation clip", n) for n in range(num_clips))
    return Factors.join([draw_factors(1, stream) for stream in streams])


def real_latents(config: Config, evaluation: EvaluationSet, part: range) -> Tensor:
    """Clean latents [B, F, C, H, W] of the real clips behind a set that `TinyWorld.draw` made."""
    codec = TinyCodec.load(codec_file(config))
    factors = evaluation_factors(len(evaluation), evaluation.seed)
    num_frames = 1 + TIME * (evaluation.latent_shape[0] - 1)
    return codec.encode(render(factors[slice(part.start, part.stop)], num_frames))


def ties_to_the_caption(config: Config) -> bool:
    """Whether a run ties samples to real clips by their caption alone, as in the paper."""
    is_dfd = issubclass(stage_of(config), DFDStage)
    return is_dfd and config.of(DFDConfig).pairing == "caption"


def text_width(config: Config) -> int:
    """The width of the text that the run's networks take."""
    return next(iter(known_sizes(config).values())).text_dim
