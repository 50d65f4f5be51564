"""Stage `dp_dmd`: DMD whose first step keeps to the teacher (DP-DMD, arXiv 2602.03139).

The steps share the work. The first one decides what is shown, so it learns where a teacher's ODE
leads from the same noise, which distribution matching cannot narrow. The later ones decide how it
looks, and learn by distribution matching, whose gradient does not reach the first step.

The paper's students keep their noise between steps (`rollout.noise=kept`), so that the first noise
decides what is shown. With fresh noise the second step sees .06 of the first one's answer in .94 of
other noise, and decides again.

Made for whole images. Here a clip has several chunks, each with a first step of its own, after the
student's own past. The teacher's ODE is that of the whole clip, or a causal teacher's after the
same past. Frames that are given stay clean in both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from selfforcing_dfd.config import Config, ranged, require
from selfforcing_dfd.context import Conditioning, KVCache, PackedContext
from selfforcing_dfd.data.shards import Batch
from selfforcing_dfd.flow import PER_SAMPLE, sigma_by_frame, x0_from_flow
from selfforcing_dfd.objectives import guided_x0
from selfforcing_dfd.ode import sampling_ladder, teacher_forced_contexts
from selfforcing_dfd.rng import Draw
from selfforcing_dfd.rollout import Rollout, replay
from selfforcing_dfd.stages.base import FlowConfig, Pass, Start, causal_start, no_text, register
from selfforcing_dfd.stages.gan import GanConfig
from selfforcing_dfd.stages.matching import MatchingStage
from selfforcing_dfd.stages.published import PublishedConfig
from selfforcing_dfd.stages.regression import RegressionConfig
from selfforcing_dfd.stages.score import ScoreConfig

Of = Literal["teacher", "causal"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AnchorConfig:
    """Where the student's first step is anchored."""

    steps: int = ranged(5, 1, 10_000)  # K: Euler's steps of the teacher's ODE, from pure noise
    of: int = ranged(30, 1, 10_000)  # the steps that the whole ODE would have
    weight: float = ranged(0.05, 0, 1000)  # of the first step's loss beside distribution matching
    teacher: Of = "teacher"  # whose ODE: of the whole clip, or of the causal teacher
    # of the teacher's ODE, 0 for score.guidance; the causal teacher's is not guided
    guidance: float = ranged(0.0, 0, 1000)

    def __post_init__(self) -> None:
        require(
            self.steps <= self.of,
            f"anchor.steps is {self.steps} and anchor.of {self.of}; the ODE has no more steps",
        )


@register
@dataclass(kw_only=True)  # slots would break super()
class DPDMDStage(MatchingStage):
    """anchor_sigmas: the levels that the anchor's ODE passes through. causal: None is `teacher`.

    anchor_guidance: of the teacher's ODE; None is that of distribution matching.
    """

    name = "dp_dmd"
    first_exit: ClassVar[int] = 1
    needs_clips = False
    sections = {
        "score": ScoreConfig,
        "anchor": AnchorConfig,
        "gan": GanConfig,
        "regression": RegressionConfig,
        "flow": FlowConfig,
        "published": PublishedConfig,
    }

    anchor_sigmas: tuple[float, ...] = ()
    anchor_weight: float = 0.0
    anchor_guidance: float | None = None
    causal: nn.Module | None = None

    @classmethod
    def own_settings(cls, config: Config, networks: Mapping[str, nn.Module]) -> dict[str, Any]:
        anchor = config.of(AnchorConfig)
        sigmas = sampling_ladder(anchor.of, config.of(FlowConfig).shift)
        return {
            "anchor_sigmas": sigmas[: anchor.steps + 1],
            "anchor_weight": anchor.weight,
            "anchor_guidance": anchor.guidance or None,
            "causal": networks["causal"] if anchor.teacher == "causal" else None,
        }

    @classmethod
    def check(cls, config: Config) -> None:
        super().check(config)
        require(
            len(config.rollout.ladder) > 1,
            "rollout.ladder has one step, which DP-DMD does not train by distribution matching; "
            "give it two or more, or use run.stage=dmd",
        )
        require(
            config.of(AnchorConfig).teacher == "teacher" or bool(config.weights.causal),
            "anchor.teacher is causal but weights.causal is empty: name a causal teacher, which "
            "stage `causal` makes, or use anchor.teacher=teacher",
        )
        require(
            config.of(AnchorConfig).teacher == "teacher" or not config.of(AnchorConfig).guidance,
            f"anchor.guidance is {config.of(AnchorConfig).guidance:g}, but the causal teacher's "
            "ODE is not guided; leave it out, or use anchor.teacher=teacher",
        )

    @classmethod
    def starts(cls, config: Config) -> dict[str, Start]:
        starts = super().starts(config)
        if config.of(AnchorConfig).teacher == "causal":
            starts["causal"] = causal_start(config)
        return starts

    @classmethod
    def passes(cls, config: Config) -> dict[str, list[Pass]]:
        passes = super().passes(config)
        anchor = config.of(AnchorConfig)
        if anchor.teacher == "causal":
            ode = [
                Pass("past, causal teacher", "causal", "committed"),
                Pass("anchor", "causal", "chunks", anchor.steps),
            ]
        else:
            guided = 1 if (anchor.guidance or config.of(ScoreConfig).guidance) == 1 else 2
            ode = [Pass("anchor", "teacher", "clip", anchor.steps * guided, rows=guided)]
        first = Pass("first step with gradient", "student", "chunks", gradient=True)
        return passes | {"student": [*passes["student"], *ode, first]}

    @classmethod
    def about(cls, config: Config) -> str:
        return "DP-DMD: the first step follows the teacher's ODE, later steps learn by DMD"

    @classmethod
    def describe_forcing(cls, config: Config) -> Iterator[tuple[str, str]]:
        anchor = config.of(AnchorConfig)
        whose = "causal teacher" if anchor.teacher == "causal" else "teacher"
        guided = f" guided by {anchor.guidance:g}" if anchor.guidance else ""
        yield (
            "anchor",
            f"of the first step: {anchor.steps} of {anchor.of} steps of the {whose}'s ODE{guided}, "
            f"weight {anchor.weight:g}",
        )

    def further_losses(
        self, batch: Batch, draw: Draw, record: Rollout
    ) -> dict[str, tuple[float, Tensor]]:
        """The first step's error as a flow: it should lead straight to the anchor.

        Every chunk's first step sees what it saw in the rollout.
        """
        given = self.given
        noise = self.rollout_noise(batch, draw)[0]
        start = torch.cat([batch.latents[:, :given], noise[:, given:]], dim=1)
        conditioning = batch.conditioning
        level = sigma_by_frame(self.ladder[0], start, given)
        first = replace(record, x_exit=start, sigma_exit=level)
        x0 = replay(self.trained["student"], first, conditioning)
        target = self.anchor(start, record.x0, conditioning, batch.text)
        # at sigma 1, an error of x0 is an error of the flow
        error = (x0 - target)[:, given:].square().mean(PER_SAMPLE)
        return {"anchor": (self.anchor_weight, error)}

    @torch.no_grad()
    def anchor(
        self, start: Tensor, past: Tensor, conditioning: Conditioning, text: Tensor
    ) -> Tensor:
        """The clean prediction of a straight way from `start` to the anchor, [B, F, C, H, W].

        start: noise, at sigma 1, after given frames. past: the clean clip whose chunks the causal
        teacher sees. The anchor is where Euler's method leads in the first steps of the teacher's
        ODE; given frames stay as they are.
        """
        negative = Conditioning(no_text(text, self.negative))
        guidance = self.guidance if self.anchor_guidance is None else self.anchor_guidance
        seen = None
        if self.causal is not None:
            cache = KVCache(self.sink, self.window)
            contexts = teacher_forced_contexts(self.causal, past, conditioning, cache, self.chunks)
            seen = PackedContext(contexts, tuple(chunk.frames for chunk in self.chunks))
        x_t = start
        for level, following in pairwise(self.anchor_sigmas):
            if self.causal is not None:
                sigma = sigma_by_frame(level, x_t, self.given)
                x0 = x0_from_flow(x_t, self.causal(x_t, sigma, conditioning, seen).flow, sigma)
            else:
                sigma = self.level(x_t.new_full(x_t.shape[:1], level), x_t)
                x0 = guided_x0(self.teacher, x_t, sigma, conditioning, negative, guidance)
            x_t = x_t + (following - level) * (x_t - x0) / level
        flow = (start - x_t) / (self.anchor_sigmas[0] - self.anchor_sigmas[-1])
        return x0_from_flow(start, flow, self.anchor_sigmas[0])
