"""Stage `regression`: at each step of its ladder, the student learns to give one known answer.

Its input is a real clip noised to a step of the ladder, after the clip's real past. In some updates
it is what entered a step of the student's own rollout, after its own past. The answer (target):

- `trajectory`: where a causal teacher's ODE leads from that very input. The input determines it, so
  nothing is averaged, and the gap of Eq. 7 in arXiv 2606.18478 can go to zero.
- `next_step`: the same ODE, but only to the ladder's next step (progressive distillation, arXiv
  2202.00512). The target is the clean prediction from which Euler's step leads exactly there. All
  steps of the ladder together then follow the ODE. The student must keep its noise.
- `consistency`: the student's own answer, one step of that ODE further down (arXiv 2303.01469).
- `clip`: the real clip. The student learns the mean of what can follow, as in teacher forcing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, Self

import torch
from torch import Tensor, nn

from selfforcing_dfd.config import Config, ranged, require
from selfforcing_dfd.context import Conditioning, Context, KVCache, PackedContext
from selfforcing_dfd.data.shards import Batch
from selfforcing_dfd.flow import (
    PER_SAMPLE,
    add_noise,
    expand_sigma,
    shift_sigma,
    sigma_by_frame,
    x0_from_flow,
)
from selfforcing_dfd.ode import descend, heun_step, teacher_forced_contexts, unshift_sigma
from selfforcing_dfd.rng import Draw
from selfforcing_dfd.rollout import Chunks, rollout
from selfforcing_dfd.stages.base import (
    FlowConfig,
    Pass,
    StageLoss,
    Start,
    TrainingStage,
    cache_sizes,
    causal_start,
    chunks_of,
    keeps_noise,
    ladder_of,
    register,
    student_start,
)
from selfforcing_dfd.stages.own_past import commits, context_sigma, real_past, require_one_ladder

Target = Literal["trajectory", "next_step", "consistency", "clip"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RegressionConfig:
    """What the student regresses to, and from where."""

    target: Target = "trajectory"
    steps: int = ranged(5, 1, 10_000)  # of Heun's method, two teacher calls each, to the answer
    own: float = ranged(0.0, 0, 1)  # share of updates on the student's own rollouts
    # weight of each step of the ladder, from the noisiest on; empty: 1 for all
    weights: tuple[float, ...] = ranged((), 0, 1000)


@register
@dataclass(slots=True)
class RegressionStage(TrainingStage):
    """causal: the teacher whose ODE is followed; None for the target `clip`.

    own: share of updates on the student's own rollouts. weights: one for each step of the ladder.
    given: first frames of a clip that are clean in every input, without loss. context_sigma: noise
    level of the chunks before.
    """

    name = "regression"
    sections = {"regression": RegressionConfig, "flow": FlowConfig}
    continues_student = True

    trained: dict[str, nn.Module]
    causal: nn.Module | None
    chunks: Chunks
    ladder: tuple[float, ...]
    shift: float
    target: Target = "trajectory"
    num_steps: int = 5
    own: float = 0.0
    weights: tuple[float, ...] = ()
    keeps_noise: bool = False
    sink: int = 0
    window: int | None = None
    given: int = 0
    context_sigma: float = 0.0

    @classmethod
    def build(
        cls, config: Config, networks: Mapping[str, nn.Module], negative: Tensor | None
    ) -> Self:
        own = config.of(RegressionConfig)
        return cls(
            {"student": networks["student"]},
            networks.get("causal"),
            chunks_of(config),
            ladder_of(config),
            config.of(FlowConfig).shift,
            own.target,
            own.steps,
            own.own,
            own.weights,
            keeps_noise(config),
            given=config.rollout.given,
            context_sigma=context_sigma(config),
            **cache_sizes(config),
        )

    @classmethod
    def check(cls, config: Config) -> None:
        own = config.of(RegressionConfig)
        ladder = config.rollout.ladder
        require_one_ladder(config)
        require(
            own.target == "clip" or bool(config.weights.causal),
            f"regression.target is {own.target} but weights.causal is empty: name a causal "
            "teacher, which stage `causal` makes, or use regression.target=clip",
        )
        require(
            own.target != "next_step" or keeps_noise(config),
            "regression.target is next_step and rollout.noise fresh; a student that learns one "
            "step of the ODE must keep its noise: use rollout.noise=kept",
        )
        require(
            own.target != "clip" or own.own == 0,
            f"regression.own is {own.own} and regression.target clip; the student's own rollouts "
            "belong to no clip: use regression.own=0",
        )
        require(
            len(own.weights) in (0, len(ladder)),
            f"regression.weights has {len(own.weights)} values for the {len(ladder)} steps of the "
            "ladder; give one each, or none",
        )

    @classmethod
    def starts(cls, config: Config) -> dict[str, Start]:
        if config.of(RegressionConfig).target == "clip":
            return {"student": student_start(config)}
        causal = causal_start(config)
        student = replace(causal, adapter=config.weights.student_adapter)
        if config.weights.student:
            student = student_start(config)
        return {"student": student, "causal": causal}

    @classmethod
    def passes(cls, config: Config) -> dict[str, list[Pass]]:
        own = config.of(RegressionConfig)
        # an own rollout at its last step has made a noisy past by itself
        made = 0.0 if commits(config) else own.own / len(config.rollout.ladder)
        past = [Pass("past", "student", "committed", 1 - made)]
        if own.target != "clip":
            # two calls a step of Heun's method; the last step down to sigma 0 needs one
            calls = {"trajectory": 2 * own.steps - 1, "next_step": 2 * own.steps, "consistency": 2}
            past += [
                Pass("past, teacher", "causal", "committed"),
                Pass("teacher's ODE", "causal", "chunks", calls[own.target]),
            ]
        if own.target == "consistency":
            past.append(Pass("one step further", "student", "chunks"))
        if own.own:
            steps = (len(config.rollout.ladder) + 1) / 2
            past.append(Pass("rollout", "student", "chunks", own.own * steps))
        return {"student": [*past, Pass("with gradient", "student", "chunks", gradient=True)]}

    @classmethod
    def about(cls, config: Config) -> str:
        return f"regression at the ladder's steps, target {config.of(RegressionConfig).target}"

    @classmethod
    def describe(cls, config: Config) -> Iterator[tuple[str, str]]:
        own = config.of(RegressionConfig)
        steps = "" if own.target == "clip" else f", {own.steps} steps of the teacher's ODE"
        past = "" if commits(config) else "; past at the last step's noise level, without commits"
        share = f"own rollouts in {own.own:.0%} of updates"
        yield "regression", f"target {own.target}{steps}; {share}{past}"

    def loss(self, turn: str, batch: Batch, draw: Draw, student_updates: int) -> StageLoss:
        student = self.trained[turn]
        conditioning = batch.conditioning
        steps_left = self.num_steps
        if self.target == "consistency":
            steps_left -= draw.choice("level", self.num_steps)
        if draw.coin("own", "update")[0] < self.own:
            past, x_t, sigma, contexts = self.own_inputs(batch, draw)
        else:
            past, x_t, sigma, contexts = self.real_inputs(batch, draw, steps_left)
        context = PackedContext(contexts, self.frames)
        target = self.answer(x_t, sigma, past, conditioning, context, steps_left)
        flow = student(x_t, sigma, conditioning, context).flow
        error = (x0_from_flow(x_t, flow, sigma) - target)[:, self.given :].square()
        weight = self.weight_of(sigma)[:, self.given :]
        loss = (error * expand_sigma(weight, error)).mean(PER_SAMPLE)
        error = error.detach().mean(PER_SAMPLE)
        return StageLoss(loss.mean(), {"loss": loss.detach(), "error": error})

    @property
    def frames(self) -> tuple[int, ...]:
        return tuple(chunk.frames for chunk in self.chunks)

    def real_inputs(
        self, batch: Batch, draw: Draw, steps_left: int
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Context, ...]]:
        """(past, x_t, sigma [B, F], contexts): the real clip, each chunk noised to a step.

        With steps_left < num_steps, that many of the ODE's steps below the ladder's step.
        """
        real = batch.latents
        noise = draw.normal("noise", real.shape[1:], real)
        step = draw.uniform("step", (len(self.chunks),)) * len(self.ladder)
        sigma = torch.tensor(self.ladder, dtype=torch.float64)[step.long()]
        u = unshift_sigma(sigma, self.shift) * (steps_left / self.num_steps)
        sigma = sigma_by_frame(self.by_frame(shift_sigma(u, self.shift)), real, self.given)
        past, level = real_past(real, draw, self.context_sigma, self.given)
        contexts = self.contexts_of(self.trained["student"], past, batch.conditioning, level)
        return real, add_noise(real, noise, sigma), sigma, contexts

    def contexts_of(
        self,
        network: nn.Module,
        past: Tensor,
        conditioning: Conditioning,
        level: Tensor | None = None,
    ) -> tuple[Context, ...]:
        """What each chunk sees of a past [B, F, C, H, W], in a network's terms.

        level: the past's noise levels [B, F]; None: it is clean.
        """
        cache = KVCache(self.sink, self.window)
        return teacher_forced_contexts(network, past, conditioning, cache, self.chunks, level)

    def own_inputs(
        self, batch: Batch, draw: Draw
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Context, ...]]:
        """(past, x_t, sigma [B, F], contexts): what entered steps of the student's own rollout."""
        shape = (1 if self.keeps_noise else len(self.ladder), *batch.latents.shape[1:])
        record = rollout(
            self.trained["student"],
            draw.normal("rollout", shape, batch.latents).transpose(0, 1),
            batch.conditioning,
            KVCache(self.sink, self.window),
            self.ladder,
            self.chunks,
            tuple(draw.choice(f"exit {n}", len(self.ladder)) for n in range(len(self.chunks))),
            given=batch.latents[:, : self.given] if self.given else None,
            commits=not self.context_sigma,
        )
        return record.x0, record.x_exit, record.sigma_exit, record.contexts

    @torch.no_grad()
    def answer(
        self,
        x_t: Tensor,
        sigma: Tensor,
        past: Tensor,
        conditioning: Conditioning,
        own: PackedContext,
        steps_left: int,
    ) -> Tensor:
        """The target for what the student sees, [B, F, C, H, W]. own: the student's context."""
        if self.causal is None:
            return past  # the real clip
        seen = self.contexts_of(self.causal, past, conditioning)
        context = PackedContext(seen, self.frames)
        teacher = self.causal
        if self.target == "consistency":
            u = unshift_sigma(sigma, self.shift) * (1 - 1 / steps_left)
            following = shift_sigma(u, self.shift)
            x_t = heun_step(teacher, x_t, sigma, conditioning, context, following)
            flow = self.trained["student"](x_t, following, conditioning, own).flow
            return x0_from_flow(x_t, flow, following)
        end = self.next_level(sigma) if self.target == "next_step" else torch.zeros_like(sigma)
        x_end = descend(teacher, x_t, sigma, conditioning, context, steps_left, self.shift, end)
        # given frames stay at sigma 0: their way is zero, and so is its length
        way = (sigma - end).clamp_min(torch.finfo(sigma.dtype).tiny)
        flow = (x_t - x_end) / expand_sigma(way, x_t)
        return x0_from_flow(x_t, flow, sigma)

    def next_level(self, sigma: Tensor) -> Tensor:
        """For each frame, [B, F], the noise level of the ladder's step after its own."""
        following = torch.zeros_like(sigma)
        for level, lower in pairwise(self.ladder):
            at_level = torch.isclose(sigma, sigma.new_tensor(level))
            following = torch.where(at_level, lower, following)
        return following

    def by_frame(self, per_chunk: Tensor) -> Tensor:
        """Values [B, chunks] as [B, F]."""
        return per_chunk.repeat_interleave(torch.tensor(self.frames), dim=1)

    def weight_of(self, sigma: Tensor) -> Tensor:
        """The weight of each frame, [B, F]."""
        weights = torch.ones_like(sigma)
        for level, weight in zip(self.ladder, self.weights, strict=False):
            weights = torch.where(torch.isclose(sigma, sigma.new_tensor(level)), weight, weights)
        return weights
