"""The optimizer's state by name: asking for it changes nothing, and it follows the parameters."""

from collections.abc import Callable

import pytest
import torch
from test_ema import assert_same, bits, make_model
from torch import nn

from selfforcing_dfd import rng
from selfforcing_dfd.training.optimizer_state import optimizer_state


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
    """Catches torch's get_optimizer_state_dict, which steps a fresh AdamW once."""
    plain = make_model()
    asked = make_model()
    plain_optimizer = make_optimizer(plain)
    asked_optimizer = make_optimizer(asked)
    tensors = [
        t for of_one in optimizer_state(asked, asked_optimizer).values() for t in of_one.values()
    ]
    assert tensors
    assert not any(tensor.any() for tensor in tensors)
    train(plain, plain_optimizer, range(4))
    train(asked, asked_optimizer, range(4))
    assert_same(bits(asked), bits(plain))


def test_optimizer_state_is_made_as_the_optimizer_makes_it() -> None:
    """Catches other names, shapes or dtypes than a later torch creates.

    Its first step would make its own, or fail.
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
    """Catches state by index.

    Another order of parameter groups would hand each parameter another one's moments.
    """
    model = make_model()
    other = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, range(3))
    other.load_state_dict(model.state_dict())
    reversed_optimizer = torch.optim.AdamW(
        [{"params": [p]} for p in reversed(list(other.parameters()))], lr=1e-2
    )
    own = optimizer_state(other, reversed_optimizer)
    for name, tensors in optimizer_state(model, optimizer).items():
        for key, tensor in tensors.items():
            own[name][key].copy_(tensor)  # in place, as a checkpoint is loaded
    train(model, optimizer, range(3, 6))
    train(other, reversed_optimizer, range(3, 6))
    assert_same(bits(other), bits(model))


def test_strange_optimizers_are_refused() -> None:
    """Catches a checkpoint without SGD's momentum or AMSGrad's maximum."""
    model = make_model()
    with pytest.raises(ValueError, match="is SGD; only the state of AdamW"):
        optimizer_state(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="amsgrad"):
        optimizer_state(model, torch.optim.AdamW(model.parameters(), amsgrad=True))
    with pytest.raises(ValueError, match="that the model has not"):
        optimizer_state(model, torch.optim.AdamW(make_model().parameters()))
