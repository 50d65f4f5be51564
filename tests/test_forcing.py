"""What ties a sample to a real clip, row by row, and which rows are anchored and trained."""

from __future__ import annotations

import pytest
import torch
from tiny_models import CHUNK, FRAMES, LADDER, conditioning, ladder_noise, latents, tiny_network

from selfforcing_dfd import forcing
from selfforcing_dfd.context import KVCache
from selfforcing_dfd.flow import add_noise
from selfforcing_dfd.forcing import PAIRINGS, Forcing
from selfforcing_dfd.rollout import RealRows, Rollout, plan_chunks, rollout

TIED = torch.tensor([True, False])


def roll(exit_step: int, tied: torch.Tensor, pairing: str = "noised_real") -> Rollout:
    chunks = plan_chunks(FRAMES, CHUNK)
    rows = RealRows(latents("real"), tied)
    return rollout(
        tiny_network(),
        ladder_noise(),
        conditioning(),
        KVCache(),
        LADDER,
        chunks,
        (exit_step,) * len(chunks),
        real_past=rows if PAIRINGS[pairing].real_past else None,
        real_input=rows if PAIRINGS[pairing].real_input else None,
    )


def test_gap_is_the_mean_squared_distance_to_the_own_anchor():
    """Catches a gap over the batch: Eq. 7 is for each sample, a mean over its values."""
    generated, real = latents("generated"), latents("real")
    gaps = forcing.gap(generated, real)
    for row in range(2):
        torch.testing.assert_close(gaps[row], (generated[row] - real[row]).square().mean())


@pytest.mark.parametrize("exit_step", [1, 2, 3])
def test_tied_rows_enter_their_exit_step_from_the_real_clip(exit_step):
    """Catches noise of another level or draw, another clip, and free rows that change.

    FastGen's forward process of the real clip to the student's timestep. A free row must be the
    free rollout bit for bit, since the batch's rows do not see each other.
    """
    record, free = roll(exit_step, TIED), roll(exit_step, ~TIED & TIED)
    noised = add_noise(latents("real"), ladder_noise()[exit_step], LADDER[exit_step])
    torch.testing.assert_close(record.x_exit[0], noised[0], rtol=0, atol=0)
    assert torch.equal(record.x_exit[1], free.x_exit[1])
    assert torch.equal(record.x0[1], free.x0[1])
    assert not torch.equal(record.x0[0], free.x0[0])


def test_at_sigma_1_the_real_clip_leaves_no_trace():
    """Catches a real clip that leaks into the first step, which starts from pure noise."""
    tied, free = roll(0, TIED | True), roll(0, TIED & False)
    assert torch.equal(tied.x0, free.x0)


@pytest.mark.parametrize("pairing", ["caption", "inversion", "prefix"])
def test_other_pairings_have_no_real_input(pairing):
    """Catches the paper's pairing from pure noise turned into the one from noised clips."""
    assert not PAIRINGS[pairing].real_input


def test_rows_with_a_real_past_are_trained_by_their_anchor_or_not_at_all():
    """Catches distribution matching on clips of pieces that do not join.

    The fake score has never seen such clips, so its answer is no gradient of any divergence.
    """
    tied = torch.tensor([True, True, False, False])
    sigma = torch.tensor([0.5, 0.9, 0.5, 0.9])
    for name, expected in (
        ("prefix", [True, False, True, True]),
        ("noised_prefix", [True, False, True, True]),
        ("noised_real", [True] * 4),
        ("caption", [True] * 4),
    ):
        settings = Forcing(PAIRINGS[name], p=0.5, sigma_range=(0.0, 0.85))
        anchored = forcing.anchored_rows(settings, tied, sigma)
        assert anchored.tolist() == [True, False, False, False]
        assert forcing.rows_with_loss(settings.pairing, tied, anchored).tolist() == expected
