"""Model FLOPs utilisation (MFU): the share of a GPU's peak that the method's operations reach.

Operations that activation checkpointing makes a second time do not count, as in PaLM (arXiv
2204.02311, appendix B).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Utilisation:
    """flops: of one sample in a turn, by turn. peak: operations a second of one GPU.

    Where the number of steps is drawn, its mean counts. So the turns of a rollout vary around what
    they reach.
    """

    flops: Mapping[str, int]
    peak: float

    def mfu(self, turn: str, samples: float, seconds: float) -> float:
        """Of a turn that took so long. samples: of the turn, for each GPU."""
        return self.flops[turn] * samples / (seconds * self.peak)
