"""Made-up rows of a report."""

from __future__ import annotations

import math

from selfforcing_dfd.evaluation.tables import Row
from selfforcing_dfd.tiny.bootstrap import Score

NAN = math.nan
MODES = (8, 6, 4, 2) + (3, 1) * 10


def row(name: str, n: int = 256, **values: tuple[float, float]) -> Row:
    """A row whose scores are those of the data but for the given `value, half-width`."""
    usual = {
        "valid": (1.0, 0.01),
        "kl_prior_sample": (0.1, 0.05),
        "contrast": (0.66, 0.01),
        "saturation": (0.5, 0.01),
        "speed_px": (0.9, 0.05),
    }
    scores = {
        key: Score(value, value - half, value + half, n)
        for key, (value, half) in (usual | values).items()
    }
    return Row(name, f"about {name}", scores, MODES)


USUAL = {"valid": (0.9, 0.02), "kl_prior_sample": (1.5, 0.1), "contrast": (0.64, 0.02)}
