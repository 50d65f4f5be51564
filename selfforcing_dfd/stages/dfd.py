"""Stage `dfd`: data-forcing distillation (arXiv 2606.18478) of a DMD student."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from selfforcing_dfd.config import Config, ranged, require
from selfforcing_dfd.forcing import PAIRINGS, Forcing
from selfforcing_dfd.stages.base import FlowConfig, register
from selfforcing_dfd.stages.gan import GanConfig
from selfforcing_dfd.stages.matching import MatchingStage
from selfforcing_dfd.stages.published import PublishedConfig
from selfforcing_dfd.stages.regression import RegressionConfig
from selfforcing_dfd.stages.score import ScoreConfig

PAIRINGS_IN_WORDS = {
    "caption": "the real clip shares the caption and nothing else, as in the paper",
    "noised_real": "the student's last step starts from the real clip, noised",
    "inversion": "the real clip's own noise",
    "prefix": "the first chunk from the real clip's noise, later ones after its real past",
    "noised_prefix": "as prefix, and the last step starts from the real clip, noised",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class DFDConfig:
    """Which rows of a batch ask the teacher about a real video (arXiv 2606.18478, Eq. 9-10)."""

    preset: Literal["", "stable"] = ""  # several settings by one name, stages/presets.py
    p: float = ranged(0.5, 0, 1)  # probability that a row is tied to a real clip
    # probability at the first student update; it goes linearly to p
    p_start: float = ranged(0.5, 0, 1)
    # student updates until p is reached; 0 is constant p
    ramp_updates: int = ranged(0, 0, 10_000_000)
    granularity: Literal["update", "micro", "sample"] = "sample"  # what shares one coin
    pairing: Literal["caption", "noised_real", "inversion", "prefix", "noised_prefix"] = "caption"
    # noise levels at which a tied row is anchored; at others it is trained by DMD, or with a real
    # past not at all
    sigma_range: tuple[float, float] = ranged((0.0, 1.0), 0, 1)
    # noise levels from which the trained step of a tied row may begin; [0, 0.99] leaves out pure
    # noise, which nothing of a clip is left in. Rows of other steps are trained by DMD
    input_range: tuple[float, float] = ranged((0.0, 1.0), 0, 1)

    def __post_init__(self) -> None:
        for name in ("sigma_range", "input_range"):
            low, high = getattr(self, name)
            require(low < high, f"dfd.{name} is [{low}, {high}]; the first must be smaller")


@register
@dataclass(slots=True)
class DFDStage(MatchingStage):
    """Distribution matching with real clips as anchors."""

    name = "dfd"
    continues_student = True
    sections = {
        "score": ScoreConfig,
        "dfd": DFDConfig,
        "gan": GanConfig,
        "regression": RegressionConfig,
        "flow": FlowConfig,
        "published": PublishedConfig,
    }

    @classmethod
    def own_settings(cls, config: Config, networks: Mapping[str, nn.Module]) -> dict[str, Any]:
        dfd = config.of(DFDConfig)
        low, high = dfd.sigma_range
        pairing = PAIRINGS[dfd.pairing]
        return {
            "forcing": Forcing(pairing, dfd.p, dfd.p_start, dfd.ramp_updates, (low, high)),
            "input_range": dfd.input_range,
            "coin_shared_by": dfd.granularity,
        }

    @classmethod
    def stored_noise(cls, config: Config) -> Literal["first", "all"]:
        pairing = PAIRINGS[config.of(DFDConfig).pairing]
        return "first" if pairing.stored_noise == "first" else "all"

    @classmethod
    def has_real_past(cls, config: Config) -> bool:
        return PAIRINGS[config.of(DFDConfig).pairing].real_past

    @classmethod
    def shares_gan_pass(cls, config: Config) -> bool:
        """Never: the teacher answers about real clips, the GAN about the student's."""
        return False

    @classmethod
    def needs_noise(cls, config: Config) -> str:
        pairing = config.of(DFDConfig).pairing
        return "" if PAIRINGS[pairing].stored_noise == "none" else f"dfd.pairing is {pairing}"

    @classmethod
    def about(cls, config: Config) -> str:
        pairing = config.of(DFDConfig).pairing
        given = config.rollout.given
        shared = f"; both begin with the same {given} latent frame(s)" if given else ""
        return f"data forcing, pairing {pairing}: {PAIRINGS_IN_WORDS[pairing]}{shared}"

    @classmethod
    def describe_forcing(cls, config: Config) -> Iterator[tuple[str, str]]:
        dfd = config.of(DFDConfig)
        low, high = dfd.sigma_range
        yield (
            "data rows",
            f"p {dfd.p:g} a {dfd.granularity}, pairing {dfd.pairing}, sigma {low:g} to {high:g}",
        )
        if dfd.input_range != (0.0, 1.0):
            low, high = dfd.input_range
            yield "tied steps", f"those that begin at sigma {low:g} to {high:g}"
