"""Which real sample anchors which generated one: optimal assignment per caption, and the gap."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from selfforcing_dfd import rng
from selfforcing_dfd.forcing import PAIRINGS, Pair, pair

SHAPE = (2, 3, 4, 6)  # F, C, H, W


def clips(name: str, batch: int, seed: int = 0) -> Tensor:
    return rng.normal((batch, *SHAPE), seed, name)


def view_cost(generated: Tensor, real: Tensor) -> Tensor:
    """Squared distances [B, B] of 2 x 2 averages, written out."""

    def view(x: Tensor) -> Tensor:
        rows = (x[..., 0::2, :] + x[..., 1::2, :]) / 2
        return ((rows[..., 0::2] + rows[..., 1::2]) / 2).flatten(1)

    return (view(generated)[:, None] - view(real)[None]).square().sum(-1)


def best_total(cost: list[list[float]]) -> float:
    """The least total cost, by dynamic programming over sets of used columns.

    It takes 2^n n steps and uses no matching theory.
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


def by_assignment(generated: Tensor, real: Tensor, captions: list[str]) -> Pair:
    return pair(PAIRINGS["assignment"], generated, real, captions)


def in_order(generated: Tensor, real: Tensor, captions: list[str]) -> Pair:
    return pair(PAIRINGS["caption"], generated, real, captions)


def test_samples_that_are_not_finite_are_paired_too():
    """Catches an assignment that fails on a student that has diverged.

    The training loop must reach the loss, which reports it.
    """
    generated, real = clips("generated", 4), clips("real", 4)
    generated[0], generated[1] = float("nan"), float("inf")
    pairs = by_assignment(generated, real, ["a"] * 4)
    assert sorted(pairs.real_index.tolist()) == [0, 1, 2, 3]


def test_identical_clips_find_each_other():
    """Catches rows and columns exchanged.

    The anchor of each sample must be its own copy, wherever that is in the batch.
    """
    real = clips("real", 8)
    order = torch.randperm(8, generator=rng.generator(1, "order"))
    pairs = by_assignment(real[order], real, ["a"] * 8)
    assert torch.equal(pairs.real_index, order)
    assert torch.equal(pairs.real, real[order])
    assert not pairs.gap.any()


def test_assignment_never_crosses_captions():
    """Catches an anchor that shows something else than was asked for, however near it is.

    Here every generated clip is a copy of a real one of the other caption.
    """
    real = clips("real", 8)
    groups = ["red", "blue"] * 4
    generated = real.roll(1, dims=0)
    pairs = by_assignment(generated, real, groups)
    assert all(groups[int(i)] == group for i, group in zip(pairs.real_index, groups, strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_every_real_clip_is_used_once_and_the_cost_never_rises(seed):
    """Catches nearest-neighbour pairing.

    It leaves out exactly the modes that the student has lost.
    """
    generated, real = clips("generated", 12, seed), clips("real", 12, seed)
    generated[:6] = generated[0]  # a collapsed student: half of its clips are one clip
    groups = [("red", "blue", "green")[i % 3] for i in range(12)]
    pairs = by_assignment(generated, real, groups)
    assert sorted(pairs.real_index.tolist()) == list(range(12))
    cost = view_cost(generated, real)
    rows = torch.arange(12)
    assert cost[rows, pairs.real_index].sum() <= cost.trace() + 1e-6
    for group in set(groups):
        members = [i for i in range(12) if groups[i] == group]
        least = best_total(cost[members][:, members].tolist())
        assert cost[members, pairs.real_index[members]].sum().item() == pytest.approx(
            least, rel=1e-5
        )


def test_layout_decides_and_texture_does_not():
    """Catches a distance over single pixels.

    A checkerboard that averages out over 2 x 2 must not change the pairing.
    """
    generated, real = clips("generated", 6), clips("real", 6)
    checks = 10 * torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(SHAPE[2] // 2, SHAPE[3] // 2)
    signs = torch.tensor([1.0, -1, 1, 1, -1, -1])[:, None, None, None, None]
    plain = by_assignment(generated, real, ["a"] * 6).real_index
    textured = by_assignment(generated, real + signs * checks, ["a"] * 6).real_index
    assert torch.equal(plain, textured)


@pytest.mark.parametrize("name", sorted(set(PAIRINGS) - {"assignment"}))
def test_other_pairings_keep_the_order_of_the_batch(name):
    """Catches a shuffled anchor.

    The reader returns each clip with its own caption, which is the paper's pairing.
    """
    generated, real = clips("generated", 4), clips("real", 4)
    pairs = pair(PAIRINGS[name], generated, real, ["a", "a", "b", "b"])
    assert torch.equal(pairs.real, real)
    assert pairs.real_index.tolist() == [0, 1, 2, 3]


def test_gap_is_the_mean_squared_distance_to_the_own_anchor():
    """Catches a gap at low resolution or over the batch.

    Eq. 7 is for each sample, a mean over its values.
    """
    generated, real = clips("generated", 6), clips("real", 6)
    for pairs in (in_order(generated, real, ["a"] * 6), by_assignment(generated, real, ["a"] * 6)):
        for row, index in enumerate(pairs.real_index.tolist()):
            torch.testing.assert_close(
                pairs.gap[row], (generated[row] - real[index]).square().mean()
            )


def test_assignment_narrows_the_gap_of_independent_clips():
    """Catches a cost that is maximised.

    Over 64 independent clips the best pairing is far below the first one.
    """
    generated, real = clips("generated", 64), clips("real", 64)
    gap = {
        p: pair(PAIRINGS[p], generated, real, ["a"] * 64).gap.mean()
        for p in ("caption", "assignment")
    }
    assert gap["assignment"] < 0.95 * gap["caption"]
