"""Made-up rows of a report."""

from __future__ import annotations

import math
from itertools import chain

from selfforcing_dfd.evaluation.tables import Row
from selfforcing_dfd.tiny.bootstrap import Score
from selfforcing_dfd.tiny.metrics import SHARES

NAN = math.nan
MODES = (8, 6, 4, 2) + (3, 1) * 34


def row(name: str, n: int = 256, **values: tuple[float, float]) -> Row:
    """A row whose scores are those of the data but for the given `value, half-width`."""
    usual = {
        "valid": (1.0, 0.0),
        "modes": (57.0, 2.0),
        "coverage": (0.98, 0.03),
        "kl_prior_sample": (0.4, 0.05),
        "kl_floor": (0.38, 0.1),
        "follow": (1.0, 0.0),
        "contrast": (0.66, 0.01),
        "saturation": (0.5, 0.01),
        "speed_px": (0.9, 0.05),
        "jitter_px": (0.2, 0.01),
        "seam_excess_px": (0.0, 0.02),
    }
    usual |= {f"share_{name}": (0.2, 0.02) for name in chain(*SHARES.values())}
    scores = {
        key: Score(value, value - half, value + half, n)
        for key, (value, half) in (usual | values).items()
    }
    return Row(name, f"about {name}", scores, MODES)


# a collapsed student
USUAL = {
    "valid": (0.99, 0.01),
    "coverage": (0.3, 0.03),
    "kl_prior_sample": (2.5, 0.1),
    "follow": (0.2, 0.05),
    "contrast": (0.64, 0.02),
}
