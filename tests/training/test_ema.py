"""The moving average: it counts student updates and keeps exact float32 values."""

import pytest
import torch
from torch import Tensor, nn

from selfforcing_dfd import rng
from selfforcing_dfd.training.ema import EMA


def make_model(seed: int = 0, width: int = 4) -> nn.Module:
    model = nn.Sequential(nn.Linear(3, width), nn.GELU(), nn.Linear(width, 2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(rng.normal(tuple(parameter.shape), seed, name))
    return model


def move(model: nn.Module, update: int) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(rng.normal(tuple(parameter.shape), 1, name, update).to(parameter))


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    assert all(
        got[name].dtype == wanted[name].dtype and torch.equal(got[name], wanted[name])
        for name in got
    )


def test_the_average_follows_its_formula() -> None:
    """Catches swapped weights or a warm-up of the decay.

    By hand in float64; the bound is 20 float32 roundings.
    """
    model = make_model()
    ema = EMA(model, decay=0.9)
    by_hand = {name: parameter.double() for name, parameter in bits(model).items()}
    for update in range(1, 21):
        move(model, update)
        ema.update(model, update)
        by_hand = {
            name: 0.9 * by_hand[name] + 0.1 * value.double() for name, value in bits(model).items()
        }
    for name, shadow in ema.shadow.items():
        assert (shadow - by_hand[name]).abs().max() < 20 * 2**-24 * by_hand[name].abs().max().clamp(
            min=1
        )


def test_one_step_is_exact_and_constant_weights_stay() -> None:
    """Catches decay * a + (1 - decay) * b, which moves an average of equal values."""
    model = make_model()
    ema = EMA(model, decay=0.99)
    for update in range(1, 50):
        ema.update(model, update)
    assert_same(ema.shadow, bits(model))
    before = bits(model)
    move(model, 50)
    ema.update(model, 50)
    assert_same(
        ema.shadow,
        {name: torch.lerp(before[name], value, 1 - 0.99) for name, value in bits(model).items()},
    )


def test_until_start_it_copies() -> None:
    """Catches an average that still remembers the random weights of before `start`."""
    model = make_model()
    ema = EMA(model, decay=0.9, start=3)
    for update in (1, 2):
        move(model, update)
        ema.update(model, update)
        assert_same(ema.shadow, bits(model))
    move(model, 3)
    ema.update(model, 3)
    assert not torch.equal(ema.shadow["0.weight"], bits(model)["0.weight"])


def test_only_student_updates_count() -> None:
    """Catches an update on fake-score turns, as in FastGen.

    Five of them turn a decay of .99 into .99 ** 6.
    """
    model = make_model()
    ema = EMA(model, decay=0.9)
    ema.update(model, 1)
    with pytest.raises(ValueError, match="has seen student update 1 and got 1"):
        ema.update(model, 1)


def test_a_bfloat16_model_is_averaged_in_float32() -> None:
    """Catches a bfloat16 shadow.

    Steps of (1 - decay) of a difference are below half its resolution and vanish.
    """
    model = make_model().bfloat16()
    ema = EMA(model, decay=0.999)
    start = {name: shadow.clone() for name, shadow in ema.shadow.items()}
    move(model, 1)
    ema.update(model, 1)
    assert all(shadow.dtype == torch.float32 for shadow in ema.shadow.values())
    assert all((shadow != start[name]).all() for name, shadow in ema.shadow.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swap_gives_back_every_bit_even_after_an_error(dtype: torch.dtype) -> None:
    """Catches a swap by arithmetic, or without `finally`.

    A failed sampling would leave the average in training.
    """
    model = make_model().to(dtype)
    ema = EMA(model, decay=0.9)
    move(model, 1)
    ema.update(model, 1)
    own = bits(model)
    with pytest.raises(RuntimeError, match="in the body"), ema.swap(model):
        assert_same(bits(model), {name: shadow.to(dtype) for name, shadow in ema.shadow.items()})
        assert not torch.equal(bits(model)["0.weight"], own["0.weight"])
        raise RuntimeError("in the body")
    assert_same(bits(model), own)


def test_the_shadow_is_no_alias_of_the_model() -> None:
    """Catches .float() without a copy: of a float32 model it is the parameter itself."""
    model = make_model()
    ema = EMA(model, decay=0.9)
    before = {name: shadow.clone() for name, shadow in ema.shadow.items()}
    move(model, 1)
    assert_same(ema.shadow, before)


def test_state_goes_to_another_average_and_to_a_model() -> None:
    """Catches a state without the counter, and copy_to leaving something out."""
    model = make_model()
    other = make_model(seed=5)
    ema = EMA(model, decay=0.9)
    restored = EMA(other, decay=0.9)
    move(model, 1)
    ema.update(model, 1)
    restored.load_state_dict(ema.state_dict())
    restored.copy_to(other)
    assert_same(bits(other), ema.shadow)
    with pytest.raises(ValueError, match="has seen student update 1"):
        restored.update(other, 1)


def test_the_state_of_another_model_changes_nothing() -> None:
    """Catches a half-loaded average: the first layers would come from the wrong model."""
    ema = EMA(make_model(), decay=0.9)
    before = {name: shadow.clone() for name, shadow in ema.shadow.items()}
    with pytest.raises(ValueError, match=r"0.weight: state \[5, 3\] float32, now \[4, 3\] float32"):
        ema.load_state_dict(EMA(make_model(seed=1, width=5), decay=0.9).state_dict())
    with pytest.raises(ValueError, match="needs student_updates and shadow"):
        ema.load_state_dict(ema.shadow)
    assert_same(ema.shadow, before)


def test_another_model_is_refused() -> None:
    """Catches averaging the fake score into the student's shadow where names differ."""
    ema = EMA(make_model(), decay=0.9)
    with pytest.raises(ValueError, match="2 parameters are not on both sides"):
        ema.update(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2)), 1)
