"""The average must count student updates, keep exact float32 values, and give the model its own
bits back.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from selfforcing_dfd import rng
from selfforcing_dfd.training.ema import (
    EMA,
    load_optimizer_state,
    load_weights,
    model_fingerprint,
    optimizer_state,
    save_weights,
)


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
    """Catches swapped weights or a warm-up of the decay; float64 by hand, error bound: 20 float32
    roundings.
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
    """Catches decay * a + (1 - decay) * b, which moves an average of equal values by a rounding at
    every update.
    """
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
    """Catches an update on fake-score turns, as in FastGen: five of them turn a decay of .99 into
    .99 ** 6.
    """
    model = make_model()
    ema = EMA(model, decay=0.9)
    ema.update(model, 1)
    with pytest.raises(ValueError, match="has seen student update 1 and got 1"):
        ema.update(model, 1)


def test_a_bfloat16_model_is_averaged_in_float32() -> None:
    """Catches a bfloat16 shadow: steps of (1 - decay) of a difference are below half its resolution
    and vanish.
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
    """Catches a swap by arithmetic, or without `finally`: a failed sampling would leave the average
    in training.
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
    """Catches .float() without a copy: on float32 models the shadow would be the parameter itself."""
    model = make_model()
    ema = EMA(model, decay=0.9)
    before = {name: shadow.clone() for name, shadow in ema.shadow.items()}
    move(model, 1)
    assert_same(ema.shadow, before)


def test_state_goes_to_another_average_and_to_a_model() -> None:
    """Catches a state without the counter, and copy_to leaving something out."""
    model, other = make_model(), make_model(seed=5)
    ema, restored = EMA(model, decay=0.9), EMA(other, decay=0.9)
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


def train(model: nn.Module, optimizer: torch.optim.Optimizer, updates: range) -> None:
    for update in updates:
        optimizer.zero_grad()
        model(rng.normal((8, 3), 2, "data", update)).square().mean().backward()
        optimizer.step()


def adamw(model: nn.Module, fused: bool = False) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.0, 0.999), fused=fused)


def fused_adamw(model: nn.Module) -> torch.optim.Optimizer:
    return adamw(model, fused=True)


def muon(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=1e-2)


@pytest.mark.parametrize("make_optimizer", [adamw, fused_adamw, muon])
def test_asking_for_the_optimizer_state_changes_no_training(
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
) -> None:
    """Catches torch's get_optimizer_state_dict, which steps a fresh AdamW once: later bias
    corrections are off.
    """
    plain, asked = make_model(), make_model()
    plain_optimizer, asked_optimizer = make_optimizer(plain), make_optimizer(asked)
    tensors = [
        t for of_one in optimizer_state(asked, asked_optimizer).values() for t in of_one.values()
    ]
    assert tensors
    assert not any(tensor.any() for tensor in tensors)
    train(plain, plain_optimizer, range(4))
    train(asked, asked_optimizer, range(4))
    assert_same(bits(asked), bits(plain))


def test_optimizer_state_is_made_as_the_optimizer_makes_it() -> None:
    """Catches other names, shapes or dtypes than a later torch creates: its first step would make
    its own, or fail.
    """
    for make_optimizer in (adamw, fused_adamw, muon):
        model = make_model()
        optimizer = make_optimizer(model)
        asked = {
            name: {key: (t.shape, t.dtype) for key, t in tensors.items()}
            for name, tensors in optimizer_state(model, optimizer).items()
        }
        optimizer.state.clear()
        train(model, optimizer, range(1))
        assert asked == {
            name: {key: (t.shape, t.dtype) for key, t in optimizer.state[parameter].items()}
            for name, parameter in model.named_parameters()
            if parameter in optimizer.state
        }


def test_optimizer_state_follows_names_not_positions() -> None:
    """Catches state by index: another order of parameter groups would hand each parameter another
    one's moments.
    """
    model, other = make_model(), make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, range(3))
    other.load_state_dict(model.state_dict())
    reversed_optimizer = torch.optim.AdamW(
        [{"params": [p]} for p in reversed(list(other.parameters()))], lr=1e-2
    )
    load_optimizer_state(other, reversed_optimizer, optimizer_state(model, optimizer))
    train(model, optimizer, range(3, 6))
    train(other, reversed_optimizer, range(3, 6))
    assert_same(bits(other), bits(model))


def test_a_learning_rate_that_may_change_stays_changed() -> None:
    """Catches hyperparameters in the state: they would silently undo what the config says on
    resume.
    """
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    state = optimizer_state(model, optimizer)
    slower = torch.optim.AdamW(model.parameters(), lr=1e-3)
    load_optimizer_state(model, slower, state)
    assert slower.param_groups[0]["lr"] == 1e-3


def test_strange_optimizers_are_refused() -> None:
    """Catches a checkpoint that leaves out what it does not know, such as SGD's momentum or
    AMSGrad's maximum.
    """
    model = make_model()
    with pytest.raises(ValueError, match="is SGD; only the state of AdamW"):
        optimizer_state(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="amsgrad"):
        optimizer_state(model, torch.optim.AdamW(model.parameters(), amsgrad=True))
    with pytest.raises(ValueError, match="that the model has not"):
        optimizer_state(model, torch.optim.AdamW(make_model().parameters()))
    optimizer = torch.optim.AdamW(model.parameters())
    wider = make_model(width=5)
    with pytest.raises(
        ValueError, match="optimizer state was made by another model: 6 entries differ"
    ):
        load_optimizer_state(
            model, optimizer, optimizer_state(wider, torch.optim.AdamW(wider.parameters()))
        )


def test_weights_survive_the_file_bit_for_bit(tmp_path: Path) -> None:
    """Catches a cast nobody asked for, lost metadata, and a temporary file left behind."""
    model = make_model()
    save_weights(tmp_path / "new" / "student.safetensors", model, {"student_updates": "40"})
    tensors, metadata = load_weights(tmp_path / "new" / "student.safetensors")
    assert_same(tensors, bits(model))
    assert metadata == {"student_updates": "40"}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["student.safetensors"]


def test_weights_are_cast_on_request_but_integers_are_not(tmp_path: Path) -> None:
    """Catches indices rounded to half precision: 2049 is 2048 in float16."""
    weights = {"w": torch.tensor([1.0, 1 / 3]), "index": torch.tensor([2049])}
    save_weights(tmp_path / "w.safetensors", weights, dtype=torch.float16)
    tensors, _ = load_weights(tmp_path / "w.safetensors")
    assert_same(tensors, {"w": weights["w"].half(), "index": weights["index"]})


def test_a_failed_export_keeps_the_old_file(tmp_path: Path) -> None:
    """Catches writing in place: tensors that share memory are refused by safetensors after the file
    was opened.
    """
    path = tmp_path / "w.safetensors"
    save_weights(path, {"w": torch.ones(2)})
    shared = torch.zeros(4)
    with pytest.raises(RuntimeError, match="share memory"):
        save_weights(path, {"a": shared, "b": shared})
    assert_same(load_weights(path)[0], {"w": torch.ones(2)})
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_a_truncated_or_missing_weights_file_is_named(tmp_path: Path) -> None:
    """Catches an error from deep inside a library that names neither the file nor the way out."""
    path = tmp_path / "w.safetensors"
    save_weights(path, {"w": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"w.safetensors is truncated .* export it again"):
        load_weights(path)
    with pytest.raises(ValueError, match=r"none.safetensors is no file"):
        load_weights(tmp_path / "none.safetensors")


def test_a_fingerprint_sees_one_bit() -> None:
    """Catches a fingerprint of names and shapes only: another teacher of the same size would pass
    for the same one.
    """
    model, same, other = make_model(), make_model(), make_model()
    with torch.no_grad():
        bias = other.get_parameter("2.bias")
        bias[1] = torch.nextafter(bias[1], torch.tensor(9.0))
    assert model_fingerprint(model) == model_fingerprint(same) != model_fingerprint(other)
