"""Which real sample anchors which generated one: an optimal assignment within each caption, and the
gap it leaves.
"""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch import Tensor

from selfforcing_dfd import rng
from selfforcing_dfd.assignment import assign
from selfforcing_dfd.pairing import PAIRINGS, pair_by_assignment, pair_in_order

SHAPE = (2, 3, 4, 6)  # F, C, H, W


def clips(name: str, batch: int, seed: int = 0) -> Tensor:
    return rng.normal((batch, *SHAPE), seed, name)


def total(cost: list[list[float]], columns: list[int] | tuple[int, ...]) -> float:
    return sum(row[column] for row, column in zip(cost, columns, strict=True))


def view_cost(generated: Tensor, real: Tensor) -> Tensor:
    """Squared distances [B, B] of 2 x 2 averages, written out."""

    def view(x: Tensor) -> Tensor:
        rows = (x[..., 0::2, :] + x[..., 1::2, :]) / 2
        return ((rows[..., 0::2] + rows[..., 1::2]) / 2).flatten(1)

    return (view(generated)[:, None] - view(real)[None]).square().sum(-1)


def best_total(cost: list[list[float]]) -> float:
    """The least total cost by dynamic programming over sets of used columns: 2^n n steps, no
    matching theory.
    """
    n = len(cost)
    best = [0.0] + [float("inf")] * (2**n - 1)
    for used in range(2**n - 1):
        row = used.bit_count()
        for column in range(n):
            if not used >> column & 1:
                following = used | 1 << column
                best[following] = min(best[following], best[used] + cost[row][column])
    return best[-1]


@pytest.mark.parametrize("n", range(1, 7))
@pytest.mark.parametrize("kind", ["random", "negative", "tied", "all equal"])
def test_assignment_is_the_best_of_all_permutations(n, kind):
    """Catches a greedy matching or prices updated one row late; they are right most of the time on
    random costs.
    """
    for trial in range(20):
        values = rng.uniform((n, n), trial, f"{kind} cost", n)
        if kind == "negative":
            values = values - 0.5
        elif kind == "tied":
            values = (3 * values).floor()
        elif kind == "all equal":
            values = torch.ones_like(values)
        cost = values.tolist()
        columns = assign(cost)
        assert sorted(columns) == list(range(n))
        least = min(total(cost, order) for order in permutations(range(n)))
        assert total(cost, columns) == pytest.approx(least, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_assignment_is_optimal_for_ten(seed):
    """Catches augmenting paths that are only right while they are short."""
    cost = rng.uniform((10, 10), seed, "cost").tolist()
    assert total(cost, assign(cost)) == pytest.approx(best_total(cost), abs=1e-12)


def test_hardest_known_order_is_solved():
    """Catches an early stop: costs i * j force every row to be moved when the next one arrives
    (Machol and Wien 1976).
    """
    cost = [[float((i + 1) * (j + 1)) for j in range(32)] for i in range(32)]
    assert assign(cost) == list(range(31, -1, -1))


def test_planted_assignment_of_thirty_two_is_found():
    """Catches errors that show at the batch sizes in use:
    prices certify the planted permutation as the only optimum.
    """
    order = torch.randperm(32, generator=rng.generator(0, "order"))
    prices = 10 * rng.uniform((2, 32), 0, "prices")
    slack = 0.1 + rng.uniform((32, 32), 0, "slack")
    slack[torch.arange(32), order] = 0
    assert assign((prices[0][:, None] + prices[1] + slack).tolist()) == order.tolist()


def test_non_finite_costs_come_back():
    """Catches an endless search on a student that has diverged:
    the loop must live to say that the loss is not finite.
    """
    nan, inf = float("nan"), float("inf")
    assert sorted(assign([[nan] * 3] * 3)) == [0, 1, 2]
    assert sorted(assign([[nan, 1.0, inf], [1.0, 2.0, nan], [inf] * 3])) == [0, 1, 2]


def test_identical_clips_find_each_other():
    """Catches rows and columns exchanged: the anchor of each sample must be its own copy,
    wherever that lies in the batch.
    """
    real = clips("real", 8)
    order = torch.randperm(8, generator=rng.generator(1, "order"))
    pair = pair_by_assignment(real[order], real, ["a"] * 8)
    assert torch.equal(pair.real_index, order)
    assert torch.equal(pair.real, real[order])
    assert not pair.gap.any()


def test_assignment_never_crosses_captions():
    """Catches an anchor that shows something else than was asked for, however near it is.

    Here every generated clip is a copy of a real one of the other caption.
    """
    real = clips("real", 8)
    groups = ["red", "blue"] * 4
    generated = real.roll(1, dims=0)
    pair = pair_by_assignment(generated, real, groups)
    assert all(groups[int(i)] == group for i, group in zip(pair.real_index, groups, strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_every_real_clip_is_used_once_and_the_cost_never_rises(seed):
    """Catches nearest-neighbour pairing, which leaves out exactly the modes that the student has
    lost.
    """
    generated, real = clips("generated", 12, seed), clips("real", 12, seed)
    generated[:6] = generated[0]  # a collapsed student: half of its clips are one clip
    groups = [("red", "blue", "green")[i % 3] for i in range(12)]
    pair = pair_by_assignment(generated, real, groups)
    assert sorted(pair.real_index.tolist()) == list(range(12))
    cost = view_cost(generated, real)
    rows = torch.arange(12)
    assert cost[rows, pair.real_index].sum() <= cost.trace() + 1e-6
    for group in set(groups):
        members = [i for i in range(12) if groups[i] == group]
        least = best_total(cost[members][:, members].tolist())
        assert cost[members, pair.real_index[members]].sum().item() == pytest.approx(
            least, rel=1e-5
        )


def test_layout_decides_and_texture_does_not():
    """Catches a distance over single pixels: a checkerboard that averages out over 2 x 2 must not
    change the pairing.
    """
    generated, real = clips("generated", 6), clips("real", 6)
    checks = 10 * torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(SHAPE[2] // 2, SHAPE[3] // 2)
    signs = torch.tensor([1.0, -1, 1, 1, -1, -1])[:, None, None, None, None]
    plain = pair_by_assignment(generated, real, ["a"] * 6).real_index
    textured = pair_by_assignment(generated, real + signs * checks, ["a"] * 6).real_index
    assert torch.equal(plain, textured)


def test_groups_may_be_any_hashable():
    """Catches captions compared as numbers or by identity."""
    pair = pair_by_assignment(clips("g", 4), clips("r", 4), [("a", 1), "b", ("a", 1), "b"])
    assert {0, 2} == set(pair.real_index[[0, 2]].tolist())


@pytest.mark.parametrize("name", ["caption", "inversion", "prefix"])
def test_other_pairings_keep_the_order_of_the_batch(name):
    """Catches a shuffled anchor: the reader hands out each clip with its own caption,
    and that is the paper's pairing.
    """
    generated, real = clips("generated", 4), clips("real", 4)
    pair = PAIRINGS[name](generated, real, ["a", "a", "b", "b"])
    assert torch.equal(pair.real, real)
    assert pair.real_index.tolist() == [0, 1, 2, 3]


def test_gap_is_the_mean_squared_distance_to_the_own_anchor():
    """Catches a gap of the low-resolution view, or one averaged over the batch: Eq. 7 is per sample
    and per value.
    """
    generated, real = clips("generated", 6), clips("real", 6)
    for pair in (
        pair_in_order(generated, real, ["a"] * 6),
        pair_by_assignment(generated, real, ["a"] * 6),
    ):
        for row, index in enumerate(pair.real_index.tolist()):
            torch.testing.assert_close(
                pair.gap[row], (generated[row] - real[index]).square().mean()
            )


def test_assignment_narrows_the_gap_of_independent_clips():
    """Catches a cost that is maximised. Over 64 independent clips the best pairing is far below the
    first one found.
    """
    generated, real = clips("generated", 64), clips("real", 64)
    gap = {
        p: PAIRINGS[p](generated, real, ["a"] * 64).gap.mean() for p in ("caption", "assignment")
    }
    assert gap["assignment"] < 0.95 * gap["caption"]
