"""Counter-based randomness: draws depend on what they are for and on nothing else."""

from __future__ import annotations

import pytest
import torch

from selfforcing_dfd import rng

PINNED_SEED = 4526025732511738191
PINNED_UNIFORM = [0.5291465023447309, 0.686420254517702, 0.5870179369244336]


def test_streams_never_change_between_versions():
    """Catches a changed hash or text form: every resumed run would silently draw other numbers."""
    assert rng.stream_seed(0, "noise", 1, 2) == PINNED_SEED
    torch.testing.assert_close(
        rng.uniform((3,), 7, "sigma", 11),
        torch.tensor(PINNED_UNIFORM, dtype=torch.float64),
        rtol=0,
        atol=0,
    )


def test_draws_do_not_depend_on_what_was_drawn_before():
    """Catches a shared generator: ranks and resumed runs would drift apart after one extra draw."""
    alone = rng.normal((4,), 0, "rollout", 5)
    rng.normal((1000,), 0, "rollout", 4)
    torch.manual_seed(123)
    assert torch.equal(rng.normal((4,), 0, "rollout", 5), alone)


def test_draws_leave_the_global_generator_alone():
    """Catches use of torch's global state, which other draws change as well."""
    before = torch.get_rng_state()
    rng.normal((4,), 0, "rollout", 5)
    rng.uniform((4,), 0, "rollout", 5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "other",
    [
        (1, "noise", 1, 11),
        (0, "score", 1, 11),
        (0, "noise", 11, 1),
        (0, "noise", 111),
        (0, "noise", 1, 11, 0),
    ],
    ids=["seed", "name", "order", "joined digits", "one counter more"],
)
def test_every_part_of_a_stream_name_counts(other):
    """Catches an ambiguous key: samples 1, 11 and 11, 1, or two purposes, would share noise."""
    assert rng.stream_seed(*other) != rng.stream_seed(0, "noise", 1, 11)


def test_neighbouring_counters_are_unrelated():
    """Catches counters used as seeds: neighbouring Mersenne streams can be correlated.

    The correlation of independent streams of length 1000 has standard error .032; 5 of them over 63
    pairs.
    """
    streams = torch.stack([rng.normal((1000,), 0, "noise", n) for n in range(64)])
    correlation = torch.corrcoef(streams).diagonal(1)
    assert correlation.abs().max() < 5 / 1000**0.5


def test_first_uniforms_of_streams_are_uniform():
    """Catches a coin that is biased because only each stream's first number is ever used.

    Kolmogorov-Smirnov distance of 2000 uniforms is below 1.95 / sqrt(2000) with probability .999;
    the streams are fixed.
    """
    first = torch.stack([rng.uniform((), 0, "dfd", n) for n in range(2000)]).sort().values
    expected = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    assert (first - expected).abs().max() < 1.95 / 2000**0.5
    assert first[0] >= 0
    assert first[-1] < 1
