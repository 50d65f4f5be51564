"""One safetensors file: bit for bit, whole or not at all; fingerprints of what is in it."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from selfforcing_dfd import rng
from selfforcing_dfd.weights.stored import WeightsError
from selfforcing_dfd.weights.tensors import model_fingerprint, save_weights


def make_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(rng.normal(tuple(parameter.shape), 0, name))
    return model


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, tensor in got.items():
        assert tensor.dtype == wanted[name].dtype
        assert torch.equal(tensor, wanted[name])


def test_weights_survive_the_file_bit_for_bit(tmp_path: Path) -> None:
    """Catches an unwanted cast, lost metadata, and a temporary file left behind."""
    model = make_model()
    save_weights(tmp_path / "new" / "student.safetensors", model, {"student_updates": "40"})
    with safe_open(tmp_path / "new" / "student.safetensors", framework="pt") as file:
        assert file.metadata()["student_updates"] == "40"
    assert_same(load_file(tmp_path / "new" / "student.safetensors"), model.state_dict())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["student.safetensors"]


def test_weights_are_cast_on_request_but_integers_are_not(tmp_path: Path) -> None:
    """Catches indices rounded to half precision: 2049 is 2048 in float16."""
    weights = {"w": torch.tensor([1.0, 1 / 3]), "index": torch.tensor([2049])}
    save_weights(tmp_path / "w.safetensors", weights, dtype=torch.float16)
    assert_same(
        load_file(tmp_path / "w.safetensors"), {"w": weights["w"].half(), "index": weights["index"]}
    )


def test_a_failed_export_keeps_the_old_file(tmp_path: Path) -> None:
    """Catches writing in place: the second tensor does not fit after the first one is written."""
    path = tmp_path / "w.safetensors"
    save_weights(path, {"w": torch.ones(2)})
    with pytest.raises(WeightsError, match=r"b has values up to .*, too large for"):
        save_weights(path, {"a": torch.zeros(4), "b": torch.tensor([1e5])}, dtype=torch.float16)
    assert_same(load_file(path), {"w": torch.ones(2)})
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_equal_weights_give_equal_files(tmp_path: Path) -> None:
    """Catches metadata in the order of a hash table, which is another one for each file."""
    weights = {"b": torch.ones(3), "a": torch.zeros(2, dtype=torch.float16)}
    metadata = {"run": "x", "stage": "dmd", "student_updates": "8", "config": "{}"}
    paths = [tmp_path / f"{number}.safetensors" for number in range(8)]
    for path in paths:
        save_weights(path, weights, metadata)
    assert len({path.read_bytes() for path in paths}) == 1


def test_a_fingerprint_sees_one_bit() -> None:
    """Catches a fingerprint of names and shapes only.

    Another teacher of the same size would pass for the same one.
    """
    model = make_model()
    same = make_model()
    other = make_model()
    with torch.no_grad():
        bias = other.get_parameter("2.bias")
        bias[1] = torch.nextafter(bias[1], torch.tensor(9.0))
    assert model_fingerprint(model) == model_fingerprint(same) != model_fingerprint(other)
