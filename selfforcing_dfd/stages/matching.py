"""Self-Forcing with distribution matching: what stages `dmd` and `dfd` share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from selfforcing_dfd import forcing
from selfforcing_dfd.config import Config
from selfforcing_dfd.context import Conditioning, KVCache
from selfforcing_dfd.data.shards import Batch
from selfforcing_dfd.flow import sigma_by_frame
from selfforcing_dfd.forcing import Forcing
from selfforcing_dfd.objectives import distribution_matching, flow_matching
from selfforcing_dfd.rng import Draw
from selfforcing_dfd.rollout import Chunks, RealRows, Rollout, replay, rollout
from selfforcing_dfd.stages.base import (
    Pass,
    StageLoss,
    Start,
    TrainingStage,
    cache_sizes,
    chunks_of,
    drop_text,
    keeps_noise,
    ladder_of,
    no_text,
    require_teacher,
    student_start,
    teacher_start,
)
from selfforcing_dfd.stages.gan import DISCRIMINATOR, Gan, GanConfig, build_discriminator, check_gan
from selfforcing_dfd.stages.own_past import (
    commits,
    first_ladder_of,
    require_one_ladder,
    rollout_passes,
)
from selfforcing_dfd.stages.published import Published, check_published, turned_on
from selfforcing_dfd.stages.regression import RegressionStage
from selfforcing_dfd.stages.score import ScoreConfig, score_sigma, values_to_log


@dataclass(slots=True)
class MatchingStage(TrainingStage):
    """DMD, or DFD in the rows that `forcing` picks.

    The fake score learns by flow matching on the student's own samples, `fake_per_student` times
    for each student update. Where there is a `regression`, the student also learns by it, with an
    optimizer of its own. keeps_noise: see `denoise_chunk`. coin_shared_by: what shares one
    data-forcing coin. input_range: noise levels from which the trained steps of tied rows begin.
    real_input: the trained step starts from the noised clip in all rows. negative: [L, D_text],
    the text of guidance's unconditional half; None is zeros. given: first frames of the real clip
    that all networks see clean, and that no loss counts. published: what the public code does
    otherwise, if it is wanted. first_ladder, commits: see `rollout`.
    """

    has_guards = True
    first_exit: ClassVar[int] = 0  # the first step of the ladder that distribution matching trains

    trained: dict[str, nn.Module]
    teacher: nn.Module
    chunks: Chunks
    ladder: tuple[float, ...]
    guidance: float
    shift: float
    sigma_min: float
    sigma_max: float
    min_normaliser: float
    fake_per_student: int
    forcing: Forcing = field(default_factory=Forcing)
    coin_shared_by: Literal["update", "micro", "sample"] = "sample"
    input_range: tuple[float, float] = (0.0, 1.0)
    sink: int = 0
    window: int | None = None
    negative: Tensor | None = None
    fake_guidance: float = 1.0
    fake_text_dropout: float = 0.0
    control_variate: bool = False
    real_input: bool = False
    regression_per_student: int = 0
    regression: RegressionStage | None = None
    gan: Gan | None = None
    keeps_noise: bool = False
    given: int = 0
    published: Published = field(default_factory=Published)
    first_ladder: tuple[float, ...] | None = None
    commits: bool = True

    @classmethod
    def build(
        cls, config: Config, networks: Mapping[str, nn.Module], negative: Tensor | None
    ) -> Self:
        score = config.of(ScoreConfig)
        trained = {"student": networks["student"], "fake": networks["fake"]}
        regression = None
        if score.regression_per_student:
            regression = RegressionStage.build(config, networks, negative)
            trained["regression"] = networks["student"]
        gan = None
        if config.of(GanConfig).weight:
            trained[DISCRIMINATOR] = networks[DISCRIMINATOR]
            shares = cls.shares_gan_pass(config)
            gan = Gan.build(config, networks["teacher"], networks[DISCRIMINATOR], shares)
        return cls(
            trained=trained,
            teacher=networks["teacher"],
            chunks=chunks_of(config),
            ladder=ladder_of(config),
            guidance=score.guidance,
            shift=score.shift,
            sigma_min=score.sigma_min,
            sigma_max=score.sigma_max,
            min_normaliser=score.min_normaliser,
            fake_per_student=score.fake_per_student,
            fake_guidance=score.fake_guidance,
            fake_text_dropout=score.fake_text_dropout,
            control_variate=score.control_variate,
            real_input=score.student_input == "noised_real",
            regression_per_student=score.regression_per_student,
            regression=regression,
            gan=gan,
            keeps_noise=keeps_noise(config),
            given=config.rollout.given,
            negative=negative,
            published=Published.of(config),
            first_ladder=first_ladder_of(config),
            commits=commits(config),
            **cls.own_settings(config, networks),
            **cache_sizes(config),
        )

    @classmethod
    def own_settings(cls, config: Config, networks: Mapping[str, nn.Module]) -> dict[str, Any]:
        """Fields that a stage of this kind adds; none for DMD."""
        return {}

    @classmethod
    def check(cls, config: Config) -> None:
        require_teacher(config)
        if config.of(ScoreConfig).regression_per_student:
            RegressionStage.check(config)
        check_gan(config)
        check_published(config, cls.as_published(config))
        if cls.first_exit:
            require_one_ladder(config)

    @classmethod
    def as_published(cls, config: Config) -> tuple[str, ...]:
        return turned_on(config, ("context_gradient", "context_noise", "sigma_tables"))

    @classmethod
    def uses_clips(cls, config: Config) -> str:
        score = config.of(ScoreConfig)
        if score.regression_per_student:
            return f"score.regression_per_student is {score.regression_per_student}"
        if score.student_input == "noised_real":
            return "score.student_input is noised_real"
        if config.rollout.given:
            return f"rollout.given is {config.rollout.given}"
        if config.of(GanConfig).weight:
            return f"gan.weight is {config.of(GanConfig).weight:g}"
        return "score.control_variate is on" if score.control_variate else ""

    @classmethod
    def starts(cls, config: Config) -> dict[str, Start]:
        weights = config.weights
        teacher = teacher_start(config)
        fake = replace(teacher, adapter=weights.fake_adapter)
        if weights.fake:
            fake = Start(weights.fake, weights.fake_entry, weights.head_dim)
        starts = {"student": student_start(config), "fake": fake, "teacher": teacher}
        if config.of(ScoreConfig).regression_per_student:
            starts |= RegressionStage.starts(config)
        return starts

    @classmethod
    def further_networks(
        cls, config: Config, networks: Mapping[str, Any], generator: torch.Generator
    ) -> dict[str, nn.Module]:
        if not config.of(GanConfig).weight:
            return {}
        teacher = networks["teacher"]
        width = teacher.config["num_attention_heads"] * teacher.config["attention_head_dim"]
        layers = teacher.config["num_layers"]
        return {DISCRIMINATOR: build_discriminator(config, width, layers, generator)}

    @classmethod
    def passes(cls, config: Config) -> dict[str, list[Pass]]:
        score = config.of(ScoreConfig)
        guided = 1 if score.guidance == 1 else 2
        fake_guided = 1 if score.fake_guidance == 1 else 2
        asked = 2 if score.control_variate else 1  # about the sample, and about the real clip
        roll_out = rollout_passes(config, cls.first_exit, cls.has_real_past(config))
        shared = int(cls.shares_gan_pass(config))  # the first of the teacher's passes
        passes = {
            "student": [
                *roll_out,
                Pass("replay with gradient", "student", "chunks", gradient=True),
                Pass("fake score", "fake", "clip", fake_guided * asked, rows=fake_guided),
                Pass("teacher", "teacher", "clip", guided * asked - shared, rows=guided),
            ],
            "fake": [*roll_out, Pass("with gradient", "fake", "clip", gradient=True)],
        }
        if config.of(GanConfig).weight:
            # the gradient goes through the teacher, not to its weights
            name = "teacher and GAN" if shared else "GAN"
            passes["student"].append(Pass(name, "teacher", "clip", gradient=True))
            shown = 3 if config.of(GanConfig).r1_weight else 2
            passes["fake"].append(Pass("GAN", "teacher", "clip", shown, rows=shown))
        if score.regression_per_student:
            passes["regression"] = RegressionStage.passes(config)["student"]
        return passes

    @classmethod
    def has_real_past(cls, config: Config) -> bool:
        """Whether real clips stand for chunks of the past in some rollouts; never in DMD."""
        return False

    @classmethod
    def shares_gan_pass(cls, config: Config) -> bool:
        """Whether a GAN reads the teacher's answer. Two sigma tables: two noise levels."""
        return bool(config.of(GanConfig).weight) and "sigma_tables" not in cls.as_published(config)

    @classmethod
    def updates(cls, config: Config) -> dict[str, int]:
        student = config.run.student_updates
        score = config.of(ScoreConfig)
        updates = {"student": student, "fake": student * score.fake_per_student}
        if score.regression_per_student:
            updates["regression"] = student * score.regression_per_student
        return updates

    @classmethod
    def describe(cls, config: Config) -> Iterator[tuple[str, str]]:
        ladder = ", ".join(f"{sigma:.4g}" for sigma in ladder_of(config))
        guidance = config.of(ScoreConfig).guidance
        yield "ladder", f"sigma {ladder}; teacher guided by {guidance:g}"
        if config.rollout.first_ladder:
            first = ", ".join(f"{sigma:.4g}" for sigma in first_ladder_of(config) or ())
            yield "first chunk", f"sigma {first}"
        if not commits(config):
            yield "context", "of the last denoising step, without a commit pass"
        if config.of(ScoreConfig).regression_per_student:
            yield from RegressionStage.describe(config)
        yield from cls.describe_forcing(config)

    @classmethod
    def describe_forcing(cls, config: Config) -> Iterator[tuple[str, str]]:
        """What `describe` adds about data forcing; nothing for DMD."""
        return iter(())

    def learners_of(self, turn: str) -> tuple[str, ...]:
        return ("fake", DISCRIMINATOR) if self.gan and turn == "fake" else (turn,)

    def loss(self, turn: str, batch: Batch, draw: Draw, student_updates: int) -> StageLoss:
        if turn == "fake":
            return self.fake_loss(batch, draw)
        if turn == "regression" and self.regression is not None:
            return self.regression.loss("student", batch, draw, student_updates)
        return self.student_loss(batch, draw, student_updates)

    def fake_loss(self, batch: Batch, draw: Draw) -> StageLoss:
        untied = torch.zeros(len(batch.latents), dtype=torch.bool, device=batch.latents.device)
        # only x0 is kept: the rollout's record would hold the K/V of all chunks
        x0 = self.roll_out(batch, draw, untied, *self.exits(draw.choice)).x0
        noise, sigma = self.draw_score(draw, x0)
        conditioning = drop_text(batch, draw, self.fake_text_dropout, self.negative)
        fake = self.published.score(self.trained["fake"], sigma)
        level = self.published.noised_at(sigma)
        loss = flow_matching(fake, x0, noise, level, conditioning, given=self.given)
        values = {"flow_loss": loss.detach(), "sigma": sigma}
        if self.gan:
            asked = batch.conditioning
            level = self.level(sigma, x0)
            other = self.gan.discriminator_loss(x0, batch.latents, noise, level, asked, draw)
            values["gan"] = other.detach()
            loss = loss + other  # of other parameters
        return StageLoss(loss.mean(), values)

    def student_loss(self, batch: Batch, draw: Draw, student_updates: int) -> StageLoss:
        conditioning = batch.conditioning
        coin = draw.coin("dfd", self.coin_shared_by)
        exits = self.exits(partial(draw.in_turn, turn=student_updates))
        tied = forcing.tied_rows(coin, self.forcing, student_updates) & self.may_be_tied(*exits)
        tied = tied.to(batch.latents.device)
        record = self.roll_out(batch, draw, tied, *exits)
        noise, sigma = self.draw_score(draw, record.x0)
        student = self.published.replayed(self.trained["student"])
        x0 = replay(student, record, conditioning)
        generated = x0.detach()
        anchored = forcing.anchored_rows(self.forcing, tied, sigma)
        with_loss = forcing.rows_with_loss(self.forcing.pairing, tied, anchored)
        heard = self.gan.listen(len(x0)) if self.gan else None
        matching = distribution_matching(
            x0,
            forcing.anchor(generated, batch.latents, anchored),
            noise,
            self.published.noised_at(sigma),
            teacher=heard or self.published.score(self.teacher, sigma),
            fake=self.published.score(self.trained["fake"], sigma),
            conditioning=conditioning,
            negative=Conditioning(no_text(batch.text, self.negative)),
            guidance=self.guidance,
            fake_guidance=self.fake_guidance,
            control=(batch.latents, ~anchored) if self.control_variate else None,
            min_normaliser=self.min_normaliser,
            given=self.given,
        )
        real = batch.latents if batch.has_clips else None
        values = values_to_log(matching, anchored, with_loss, sigma)
        if real is not None:
            values["gap"] = forcing.gap(generated[:, self.given :], real[:, self.given :])
        loss = matching.loss * with_loss
        further = self.further_losses(batch, draw, record)
        if self.gan:
            level = self.level(sigma, x0)
            of_gan = self.gan.student_loss(x0, noise, level, conditioning, heard)
            further["gan"] = self.gan.weight, of_gan
        for name, (weight, other) in further.items():
            values[name] = other.detach()
            loss = loss + weight * other
        return StageLoss(loss.mean(), values, generated, real)

    def further_losses(
        self, batch: Batch, draw: Draw, record: Rollout
    ) -> dict[str, tuple[float, Tensor]]:
        """(weight, loss [B]) of what else a student update minimises, by its name in the log."""
        return {}

    def exits(self, choose: Callable[[str, int], int]) -> tuple[int, int | None]:
        """The step that is trained in each chunk, and that of the first one if its ladder is other.

        choose: one of so many options, by what it is for.
        """
        step = self.first_exit + choose("exit", len(self.ladder) - self.first_exit)
        return step, choose("first exit", len(self.first_ladder)) if self.first_ladder else None

    def may_be_tied(self, exit_step: int, of_first: int | None = None) -> bool:
        """Whether the noise levels from which the trained steps begin lie in `input_range`."""
        begins = [self.ladder[exit_step]]
        if of_first is not None and self.first_ladder:
            begins.append(self.first_ladder[of_first])
        low, high = self.input_range
        return all(low <= sigma <= high for sigma in begins)

    def roll_out(
        self, batch: Batch, draw: Draw, tied: Tensor, exit_step: int, of_first: int | None = None
    ) -> Rollout:
        """The student's clips for the batch's captions; `tied` rows [B] as the pairing says."""
        noise = self.rollout_noise(batch, draw)
        first = exit_step if of_first is None else of_first
        pairing = self.forcing.pairing
        real_past = RealRows(batch.latents, tied) if pairing.real_past else None
        start = forcing.start_noise(pairing, noise[0], batch.noise, tied, self.chunks)
        return rollout(
            self.trained["student"],
            torch.cat([start[None], noise[1:]]),
            batch.conditioning,
            KVCache(self.sink, self.window),
            self.ladder,
            self.chunks,
            exit_steps=(first, *(exit_step,) * (len(self.chunks) - 1)),
            real_past=self.published.past(real_past, batch.latents, draw),
            real_input=self.rows_of_real_input(batch, tied),
            given=batch.latents[:, : self.given] if self.given else None,
            first_ladder=self.first_ladder,
            commits=self.commits,
        )

    def rows_of_real_input(self, batch: Batch, tied: Tensor) -> RealRows | None:
        """In which rows the noised real clip enters the exit step."""
        if self.real_input:
            return RealRows(batch.latents, torch.ones_like(tied))
        return RealRows(batch.latents, tied) if self.forcing.pairing.real_input else None

    def level(self, sigma: Tensor, latents: Tensor) -> Tensor:
        """Sigma [B], or [B, F] with 0 at given frames."""
        return sigma_by_frame(sigma, latents, self.given) if self.given else sigma

    def rollout_noise(self, batch: Batch, draw: Draw) -> Tensor:
        """[S, B, F, C, H, W]: what a clip starts from, and what is added after each step."""
        steps = max(len(self.ladder), len(self.first_ladder or ()))
        shape = (1 if self.keeps_noise else steps, *batch.latents.shape[1:])
        return draw.normal("rollout", shape, batch.latents).transpose(0, 1)

    def draw_score(self, draw: Draw, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Noise like the latents, and the sigma [B] at which teacher and fake score are asked."""
        noise = draw.normal("score", latents.shape[1:], latents)
        u = self.published.uniform(draw.uniform("sigma"))
        sigma = score_sigma(u, self.shift, self.sigma_min, self.sigma_max)
        return noise, sigma.to(latents)
