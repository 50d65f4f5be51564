"""Stage `dmd`: distribution matching distillation (arXiv 2311.18828) of a causal student."""

from __future__ import annotations

from dataclasses import dataclass

from selfforcing_dfd.config import Config
from selfforcing_dfd.stages.base import FlowConfig, register
from selfforcing_dfd.stages.gan import GanConfig
from selfforcing_dfd.stages.matching import MatchingStage
from selfforcing_dfd.stages.published import PublishedConfig
from selfforcing_dfd.stages.regression import RegressionConfig
from selfforcing_dfd.stages.score import ScoreConfig


@register
@dataclass(slots=True)
class DMDStage(MatchingStage):
    """Distribution matching on the student's own samples. Captions without clips will do."""

    name = "dmd"
    sections = {
        "score": ScoreConfig,
        "gan": GanConfig,
        "regression": RegressionConfig,
        "flow": FlowConfig,
        "published": PublishedConfig,
    }
    needs_clips = False

    @classmethod
    def about(cls, config: Config) -> str:
        return "DMD alone, without data forcing"
