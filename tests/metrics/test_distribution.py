"""Two sets of clips compared, against loops and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from selfforcing_dfd.metrics.distribution import (
    density_and_coverage,
    memorisation,
    mmd,
    precision_and_recall,
    radii,
    vendi,
)
from selfforcing_dfd.rng import normal


def sets(count: int = 30, others: int = 24, dims: int = 2) -> tuple[Tensor, Tensor]:
    return normal((count, dims), 0, "generated") + 0.7, normal((others, dims), 0, "reference")


def looped_radius(vectors: Tensor, number: int, nearest: int) -> float:
    apart = [float((vectors[number] - other).norm()) for other in vectors]
    return sorted(apart)[nearest]  # the first is the clip itself


def test_precision_recall_density_and_coverage_equal_loops():
    """Catches radii of the wrong set, a clip that is its own neighbour, and swapped sides."""
    generated, reference = sets()
    third = [looped_radius(reference, n, 3) for n in range(24)]
    own = [looped_radius(generated, n, 3) for n in range(30)]
    fifth = [looped_radius(reference, n, 5) for n in range(24)]
    apart = [[float((one - other).norm()) for other in reference] for one in generated]
    rows, columns = range(30), range(24)
    precision = sum(any(apart[i][j] <= third[j] for j in columns) for i in rows) / 30
    recall = sum(any(apart[i][j] <= own[i] for i in rows) for j in columns) / 24
    density = sum(apart[i][j] <= fifth[j] for i in rows for j in columns) / (5 * 30)
    coverage = sum(any(apart[i][j] <= fifth[j] for i in rows) for j in columns) / 24
    found = precision_and_recall(generated, reference) | density_and_coverage(generated, reference)
    wanted = {"precision": precision, "recall": recall, "density": density, "coverage": coverage}
    for name, value in wanted.items():
        assert found[name].value == pytest.approx(value), name
        assert found[name].low <= value <= found[name].high
    assert 0 < recall < 1
    assert 0 < coverage < 1
    with pytest.raises(ValueError, match="want at least 4"):
        radii(generated[:3], 3)


def test_sides_of_precision_and_recall():
    """Catches precision and recall under each other's name: a collapsed set is precise only."""
    reference = normal((60, 3), 1, "data")
    collapsed = reference[:1] + 0.01 * normal((40, 3), 2, "data")
    found = precision_and_recall(collapsed, reference) | density_and_coverage(collapsed, reference)
    assert found["precision"].value == 1
    assert found["recall"].value < 0.1
    assert found["coverage"].value < 0.3


def test_the_vendi_score_counts_what_is_different():
    """Catches another order of the entropy: 4 of one kind and 2 of another are 1.89 kinds."""
    assert vendi(torch.eye(7)) == pytest.approx(7)
    assert vendi(torch.ones(5, 1)) == pytest.approx(1)
    kinds = torch.eye(2)[[0, 0, 0, 0, 1, 1]]
    entropy = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert vendi(kinds) == pytest.approx(math.exp(entropy))


def test_mmd_equals_loops_and_the_closed_form_of_normals():
    """Catches a biased estimate: pairs of a clip with itself."""
    generated, reference = sets(5, 4)

    def kernel(one: Tensor, other: Tensor) -> float:
        return math.exp(-float((one - other).square().sum()) / (2 * 1.5**2))

    within = sum(kernel(generated[i], generated[j]) for i in range(5) for j in range(5) if i != j)
    other = sum(kernel(reference[i], reference[j]) for i in range(4) for j in range(4) if i != j)
    across = sum(kernel(one, another) for one in generated for another in reference)
    wanted = within / 20 + other / 12 - 2 * across / 20
    assert mmd(generated, reference, 1.5) == pytest.approx(wanted)
    shift = 0.8
    one, another = normal((1500, 1), 3, "mmd") + shift, normal((1500, 1), 4, "mmd")
    closed = 2 / math.sqrt(3) * (1 - math.exp(-(shift**2) / 6))
    assert mmd(one, another, 1.0) == pytest.approx(closed, abs=0.02)
    assert abs(mmd(one - shift, another)) < 0.005


@pytest.mark.parametrize("learned", [0.0, 0.5])
def test_what_was_learned_by_heart_is_found(learned: float):
    """Catches copies that pass, and a larger training set that is nearer only by its size."""
    training = normal((300, 4), 5, "memory")
    held_out = normal((100, 4), 6, "memory")
    fresh = normal((200, 4), 7, "memory")
    copies = round(learned * 200)
    generated = torch.cat([training[:copies] + 1e-4, fresh[copies:]])
    found = memorisation(generated, training, held_out)
    assert found.copies.value == pytest.approx(learned, abs=0.04)
    assert found.nearest[:copies] == list(range(copies))
    if learned:
        # of the copies, a third are of the hundred training clips that were picked
        assert found.nearer.low > 0.5
        assert found.ratio < 0.95
    else:
        assert found.nearer.low < 0.5 < found.nearer.high
        assert found.ratio == pytest.approx(1, abs=0.1)
    with pytest.raises(ValueError, match="one set is empty"):
        memorisation(generated, training[:0], held_out)
