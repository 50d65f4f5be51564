"""Random choices of a stage: the coin of data forcing, noise, and exit steps."""

from __future__ import annotations

import pytest
import torch
from tiny_models import SHAPE, DataForcing
from tiny_stages import draw

from selfforcing_dfd.forcing import tied_rows
from selfforcing_dfd.rng import Draw


@pytest.mark.parametrize("granularity", ["update", "micro", "sample"])
def test_coin_is_shared_by_what_its_granularity_says(granularity):
    """Catches a coin that is shared by too many or too few samples.

    With a coin for each sample, DFD at p = .5 never has an update of one kind only. 64 updates of 4
    micro-batches of 4: at p = .5 a wrong grouping passes by chance once in 2^48.
    """
    forcing = DataForcing(p=0.5, granularity=granularity)
    coins = torch.stack(
        [
            torch.stack(
                [
                    forcing.rows(draw(4, 16 * update + 4 * micro, 16 * update), 0)
                    for micro in range(4)
                ]
            )
            for update in range(64)
        ]
    )  # [update, micro-batch, sample]
    equal_in_micro = (coins == coins[:, :, :1]).all()
    equal_in_update = (coins == coins[:, :1, :1]).all()
    assert bool(equal_in_micro) == (granularity != "sample")
    assert bool(equal_in_update) == (granularity == "update")
    assert coins.any()
    assert not coins.all()


@pytest.mark.parametrize("granularity", ["update", "micro", "sample"])
def test_probability_zero_is_never_and_one_is_always(granularity):
    """Catches a coin compared the wrong way round: p = 0 must be DMD, p = 1 the data branch."""
    for p, expected in ((0.0, False), (1.0, True)):
        forcing = DataForcing(p=p, granularity=granularity)
        assert all(forcing.rows(draw(4, 4 * n, 4 * n), 0).eq(expected).all() for n in range(50))


def test_coin_shows_data_with_probability_p():
    """Catches 1 - p for p. 2000 independent coins at .3: five standard errors are .051."""
    forcing = DataForcing(p=0.3, granularity="update")
    rows = torch.stack([forcing.rows(draw(1, 16 * n, 16 * n), 0) for n in range(2000)])
    assert rows.double().mean() == pytest.approx(0.3, abs=0.051)


@pytest.mark.parametrize("p", [0.25, 0.5, 0.75])
def test_coins_of_samples_give_every_update_its_share(p):
    """Catches updates with more or fewer data rows than p says, which 24 updates do not even out.

    Also where an update is cut into micro-batches; and every place in the batch gets its share.
    """
    forcing = DataForcing(p=p, granularity="sample")
    rows = []
    for start in range(0, 16 * 400, 16):
        parts = [forcing.rows(draw(4, start + micro, start), 0) for micro in (0, 4, 8, 12)]
        rows.append(torch.cat(parts))
        assert rows[-1].sum() == 16 * p
        assert torch.equal(rows[-1], forcing.rows(draw(16, start, start), 0))
    # 400 coins a place: five standard errors are .125
    torch.testing.assert_close(
        torch.stack(rows).double().mean(0), torch.full((16,), p).double(), rtol=0, atol=0.125
    )


def test_turns_take_every_option_in_an_order_of_their_own():
    """Catches options that come more often than others, and one order for all rounds."""
    one = draw(seed=5)
    taken = [one.in_turn("exit", 4, turn) for turn in range(40)]
    rounds = [tuple(taken[n : n + 4]) for n in range(0, 40, 4)]
    assert all(sorted(each) == [0, 1, 2, 3] for each in rounds)
    assert len(set(rounds)) > 3
    assert taken == [draw(seed=5, update=99).in_turn("exit", 4, turn) for turn in range(40)]


def test_probability_ramps_in_student_updates():
    """Catches a ramp that ends early, overshoots, or divides by zero when there is none."""
    coin = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]
    ramp = DataForcing(p=0.5, p_start=0.1, ramp_updates=4).settings()["forcing"]
    shares = [tied_rows(coin, ramp, n).double().mean().item() for n in (0, 1, 2, 4, 400)]
    assert shares == pytest.approx([0.1, 0.2, 0.3, 0.5, 0.5], abs=2e-3)
    no_ramp = DataForcing(p=0.5, p_start=0.1).settings()["forcing"]
    assert tied_rows(coin, no_ramp, 0).sum() == 500


def test_draws_depend_on_positions_only():
    """Catches noise tied to the micro-batch, the rank or the order of calls.

    Another batch size must draw the same.
    """
    whole = draw(4, first=8)
    part = Draw(0, update_start=999, update_size=2, micro_start=7, positions=(10, 9))
    like = torch.zeros((), dtype=torch.float64)
    assert torch.equal(
        part.normal("score", SHAPE, like), whole.normal("score", SHAPE, like)[[2, 1]]
    )
    assert torch.equal(part.uniform("sigma"), whole.uniform("sigma")[[2, 1]])
    assert not torch.equal(
        whole.normal("score", SHAPE, like)[0], whole.normal("score", SHAPE, like)[1]
    )


def test_choices_are_shared_by_an_update_and_differ_between_updates():
    """Catches an exit step drawn by each rank or micro-batch.

    Ranks would walk different ladders and wait for each other.
    """
    choices = [
        draw(2, first=16 * update + 2, update=16 * update).choice("exit", 4) for update in range(40)
    ]
    again = [
        draw(4, first=16 * update + 8, update=16 * update).choice("exit", 4) for update in range(40)
    ]
    assert choices == again
    assert set(choices) == {0, 1, 2, 3}
