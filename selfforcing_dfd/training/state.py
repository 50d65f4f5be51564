"""Nested state of a run and its flat form: tensors and plain values by dotted key."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful

from selfforcing_dfd.weights.checkpoint_files import CheckpointError

State = dict[str, Any]
"""Nested dicts with string keys whose leaves are tensors, int, float, str, bool or None. At the top
level also objects with `state_dict` and `load_state_dict`: modules, EMA, Clock.
"""


def unfold(state: State) -> State:
    """The state with dicts in place of the objects at its top level."""
    return {
        name: holder.state_dict() if isinstance(holder, Stateful) else holder
        for name, holder in state.items()
    }


def flatten(unfolded: State) -> tuple[dict[str, Tensor], State]:
    """(tensors, plain values) by dotted key. CheckpointError for a leaf that is neither."""
    tensors: dict[str, Tensor] = {}
    values: State = {}
    for key, leaf in leaves(unfolded).items():
        if isinstance(leaf, Tensor):
            tensors[key] = leaf.detach()
        elif type(leaf) in (int, float, str, bool, type(None)):
            values[key] = leaf
        elif leaf != {}:
            raise CheckpointError(
                f"{key} is a {type(leaf).__name__}; a checkpoint holds nested dicts of tensors, "
                "int, float, str, bool and None. For an optimizer pass "
                "optimizer_state(model, optimizer)"
            )
    return tensors, values


def put_values(unfolded: State, values: State, prefix: str = "") -> None:
    """Put plain values, by dotted key, to their places in nested dicts."""
    for name, child in unfolded.items():
        if isinstance(child, dict):
            put_values(child, values, f"{prefix}{name}.")
        elif not isinstance(child, Tensor):
            unfolded[name] = values[f"{prefix}{name}"]


def give_back(state: State, unfolded: State) -> None:
    """Hand the parts of an unfolded state to the objects they came from."""
    for name, holder in state.items():
        if isinstance(holder, Stateful):
            holder.load_state_dict(unfolded[name])
        elif not isinstance(holder, dict | Tensor):
            state[name] = unfolded[name]


def leaves(tree: Any, prefix: str = "") -> State:
    """Dotted keys of nested dicts; an empty dict is a leaf. CheckpointError for a key met twice."""
    found: State = {}
    for name, child in tree.items():
        key = f"{prefix}{name}"
        part = leaves(child, f"{key}.") if isinstance(child, dict) and child else {key: child}
        twice = sorted(part.keys() & found.keys())
        if twice:
            raise CheckpointError(f"two entries are called {twice[0]}; rename one")
        found |= part
    return found
