"""A GAN beside distribution matching, as in DMD2 (arXiv 2405.14867, 4.4). A switch: `gan.weight`.

The discriminator sees clips as the score networks do, noised, through blocks of the frozen teacher.
It learns in the turns of the fake score. Losses are softplus, not saturating. In DMD the student's
sample is shown to it by the pass in which the teacher answers anyway; see `Overheard`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from selfforcing_dfd.config import Config, ranged, require
from selfforcing_dfd.context import ChunkKV, Conditioning, Context, NetworkOutput
from selfforcing_dfd.flow import add_noise, expand_sigma
from selfforcing_dfd.models.discriminator import Discriminator, block_outputs
from selfforcing_dfd.rng import Draw

DISCRIMINATOR = "discriminator"


@dataclass(frozen=True, kw_only=True, slots=True)
class GanConfig:
    """weight 0: no GAN. Its learning rate is the fake score's."""

    weight: float = ranged(0.0, 0, 1000)  # of the student's loss; FastGen has .03 for DMD2 on Wan
    depths: tuple[float, ...] = ranged((0.5, 0.75, 1.0), 0, 1)  # of the teacher's blocks it reads
    inner: int = ranged(384, 1, 100_000)  # width of its hidden layers
    # of R1 as FastGen approximates it: scores of a real clip should not change with a little noise
    r1_weight: float = ranged(0.0, 0, 1_000_000)
    r1_noise: float = ranged(0.1, 0, 10, above=True)


@dataclass(frozen=True, slots=True)
class Gan:
    """teacher: frozen, asked about whole noised clips. discriminator: reads its blocks.

    shares: a student update asks the teacher about the student's sample anyway.
    """

    teacher: Any
    discriminator: Discriminator
    weight: float
    r1_weight: float = 0.0
    r1_noise: float = 0.1
    shares: bool = False

    @classmethod
    def build(cls, config: Config, teacher: Any, discriminator: Any, shares: bool) -> Gan:
        gan = config.of(GanConfig)
        return cls(teacher, discriminator, gan.weight, gan.r1_weight, gan.r1_noise, shares)

    def judge(
        self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The student's loss softplus(-score) [B], its gradient at x_t, and the teacher's flow.

        The gradient is taken here: else the discriminator's parameters would get one as well.
        """
        with torch.enable_grad():
            x_t = x_t.detach().requires_grad_()
            layers = self.discriminator.layers
            features, flow = block_outputs(self.teacher, layers, x_t, sigma, conditioning)
            loss = softplus(-self.discriminator(features)).mean(1)
            (gradient,) = torch.autograd.grad(loss.sum(), x_t)
        return loss.detach(), gradient, flow.detach()

    def student_loss(
        self,
        x0: Tensor,
        noise: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        heard: Overheard | None = None,
    ) -> Tensor:
        """[B]: softplus(-score) of the student's clips x0, with gradient to x0 alone.

        sigma: [B] or [B, F], here and in the discriminator's loss. heard: what listened to the
        teacher's answer about these clips; None asks anew.
        """
        if heard is None:
            x_t = add_noise(x0.detach(), noise, sigma)
            loss, gradient, _ = self.judge(x_t, sigma, conditioning)
        else:
            loss, gradient = heard.loss, heard.gradient
        of_x0 = gradient * expand_sigma(1 - sigma, gradient)
        moved = (of_x0 * (x0 - x0.detach())).flatten(1).sum(1)  # zero, with that gradient
        return loss + moved

    def listen(self, rows: int) -> Overheard | None:
        """The teacher to ask in a student update of so many rows; None where nothing is shared."""
        return Overheard(self, rows) if self.shares else None

    def discriminator_loss(
        self,
        x0: Tensor,
        real: Tensor,
        noise: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        draw: Draw,
    ) -> Tensor:
        """[B]: softplus(score) of made clips and softplus(-score) of real ones, noised alike."""
        real_t = add_noise(real, noise, sigma)
        clips = [add_noise(x0.detach(), noise, sigma), real_t]
        if self.r1_weight:
            small = draw.normal("r1", real.shape[1:], real)
            # given frames, at sigma 0, stay clean
            clips.append(real_t + self.r1_noise * small * (expand_sigma(sigma, small) > 0))
        with torch.no_grad():
            features, _ = block_outputs(
                self.teacher,
                self.discriminator.layers,
                torch.cat(clips),
                torch.cat([sigma] * len(clips)),
                replace(conditioning, text=conditioning.text.repeat(len(clips), 1, 1)),
            )
        made, of_real, *moved = self.discriminator(features).chunk(len(clips))
        loss = softplus(made).mean(1) + softplus(-of_real).mean(1)
        for scores in moved:
            loss = loss + self.r1_weight * (scores - of_real).square().mean(1)
        return loss


class Overheard:
    """The teacher, whose first answer, about the student's sample, the discriminator reads too.

    Guidance asks with and without caption in one batch. Here they are two passes, so that the
    gradient goes through the first alone. loss, gradient: as of `Gan.judge`, once it was asked.
    """

    loss: Tensor
    gradient: Tensor

    def __init__(self, gan: Gan, rows: int) -> None:
        self.gan = gan
        self.rows = rows
        self.has_answered = False

    def __call__(
        self,
        x_t: Tensor,
        sigma: Tensor | float,
        conditioning: Conditioning,
        context: Context | None = None,
    ) -> NetworkOutput:
        if self.has_answered:  # of a control variate: about another clip
            answer: NetworkOutput = self.gan.teacher(x_t, sigma, conditioning, context)
            return answer
        self.has_answered = True
        assert isinstance(sigma, Tensor)
        assert context is None
        clips = x_t.split(self.rows)
        levels = sigma.split(self.rows)
        texts = conditioning.text.split(self.rows)
        flows: list[Tensor] = []
        for clip, level, text in zip(clips, levels, texts, strict=True):
            asked = replace(conditioning, text=text)
            if flows:
                flow = self.gan.teacher(clip, level, asked).flow
            else:
                self.loss, self.gradient, flow = self.gan.judge(clip, level, asked)
            flows.append(flow)
        return NetworkOutput(torch.cat(flows), ChunkKV(x_t.shape[1], ()))


def build_discriminator(
    config: Config, width: int, num_layers: int, generator: torch.Generator
) -> Discriminator:
    """A discriminator for a teacher of this size, with weights from the generator."""
    gan = config.of(GanConfig)
    made = Discriminator(width, num_layers, gan.depths, gan.inner)
    with torch.no_grad():
        for parameter in made.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return made


def check_gan(config: Config) -> None:
    """ConfigError for settings under which there can be no GAN."""
    gan = config.of(GanConfig)
    if not gan.weight:
        return
    require(bool(gan.depths), "gan.depths is empty; name at least one depth, such as [0.5, 1.0]")
    require(
        config.model.sequence_ranks == 1,
        f"gan.weight is {gan.weight} and model.sequence_ranks {config.model.sequence_ranks}; the "
        "discriminator reads whole clips: use model.sequence_ranks=1",
    )
