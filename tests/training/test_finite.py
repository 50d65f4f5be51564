"""No optimizer step on values that are not finite."""

import math

import pytest
import torch

from selfforcing_dfd import rng
from selfforcing_dfd.training.finite import (
    NonFiniteError,
    check_finite,
    check_losses,
    require_finite,
)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(value: float) -> None:
    """Catches a NaN loss that reaches the optimizer: every weight would be NaN one step later."""
    with pytest.raises(
        NonFiniteError, match=f"loss is {value} at student update 12, fake turn.*Look at"
    ):
        check_finite(torch.tensor(value), [("w", torch.ones(2))], "student update 12, fake turn")
    with pytest.raises(NonFiniteError, match="normaliser is not finite in 1 of 2 values"):
        require_finite("normaliser", torch.tensor([1.0, value]), "student update 12")
    require_finite("loss", 1.0, "student update 12")


def test_the_first_bad_gradient_is_named() -> None:
    """Catches an error that leaves the search to the user.

    The norm alone only says that something is wrong.
    """
    bad = torch.ones(4, 2)
    bad[2, 1] = math.nan
    grads = [
        ("a", torch.ones(3)),
        ("frozen", None),
        ("b.weight", bad),
        ("c", torch.full((2,), math.inf)),
    ]
    with pytest.raises(
        NonFiniteError,
        match=r"gradient of b.weight is not finite in 1 of 8 values at student update 3",
    ):
        check_finite(torch.tensor(1.0), grads, "student update 3")


def test_the_norm_is_that_of_all_gradients_in_float32() -> None:
    """Catches norms summed instead of squared, and a norm rounded to bfloat16 (.4 % off)."""
    grads = {name: rng.normal((50, 7), 0, name) for name in ("a", "b")}
    norm = check_finite(torch.tensor(1.0), grads.items(), "student update 1")
    by_hand = sum(grad.double().square().sum() for grad in grads.values()) ** 0.5
    assert abs(norm - by_hand) < 1e-6 * by_hand  # float32 rounding is 6e-8 each way
    half = check_finite(
        torch.tensor(1.0), [("w", torch.ones(20000, dtype=torch.bfloat16))], "student update 1"
    )
    assert half.dtype == torch.float32
    assert abs(half - 20000**0.5) < 1e-3


def test_finite_gradients_whose_norm_overflows_are_an_error() -> None:
    """Catches clipping by an infinite norm, which makes every gradient zero."""
    with pytest.raises(NonFiniteError, match="norm over 1 gradients overflows"):
        check_finite(torch.tensor(1.0), [("w", torch.full((4,), 3e38))], "student update 1")


def test_a_turn_without_gradients_is_an_error() -> None:
    """Catches a step on nothing.

    A detached loss has no gradient anywhere, and AdamW would quietly do nothing.
    """
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        check_finite(torch.tensor(1.0), [("w", None)], "student update 1")


def test_the_rank_with_a_bad_loss_is_named() -> None:
    """Catches a NaN of one rank that becomes a NaN of the mean, and so of nobody."""
    losses = torch.tensor([[1.0, 2.0], [3.0, math.nan], [5.0, 6.0]])
    with pytest.raises(NonFiniteError, match="loss of rank 1 is nan at student update 3"):
        check_losses(losses, "student update 3")
    assert check_losses(losses[::2], "student update 3") == 3.5
    with pytest.raises(NonFiniteError, match="loss is nan at student update 3"):
        check_losses(losses[1:2], "student update 3")
