"""Weights stored in 8 bits a value."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from selfforcing_dfd.cli.run_commands import STAGES
from selfforcing_dfd.common import shipped
from selfforcing_dfd.models.identity import Identity
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.stages import load_config, stage_of
from selfforcing_dfd.weights.eight_bits import in_8_bits
from selfforcing_dfd.weights.read import load_network
from selfforcing_dfd.weights.stored import WeightsError
from selfforcing_dfd.weights.tensors import save_weights
from selfforcing_dfd.weights.write import convert, file_metadata
from tests.tiny_models import tiny_network

METADATA = file_metadata(tiny_network().config, Identity("teacher"))


@pytest.fixture
def network() -> WanTransformer:
    return tiny_network(dtype=torch.float32)


def save(network: WanTransformer, path: Path) -> Path:
    save_weights(path, network, METADATA, torch.int8)
    return path


def test_values_are_off_by_half_a_step(network: WanTransformer, tmp_path: Path) -> None:
    loaded = load_network(save(network, tmp_path / "small.safetensors")).state_dict()
    for name, own in network.state_dict().items():
        stored = loaded[name]
        assert stored.dtype == torch.float16
        allowed = 2**-11 * own.abs()  # of float16
        if own.ndim == 2:
            allowed = allowed + own.abs().amax(dim=1, keepdim=True) / 254 * (1 + 1e-3)
        assert ((stored.float() - own).abs() <= allowed + 1e-7).all(), name


def test_a_matrix_takes_a_byte_a_value_and_four_a_row(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    save_weights(path, {"w": torch.ones(64, 256)}, {}, torch.int8)
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == 8 + header + 64 * 256 + 4 * 64


def test_8_bits_again_are_the_same_8_bits(network: WanTransformer, tmp_path: Path) -> None:
    once = load_network(save(network, tmp_path / "once.safetensors"))
    twice = load_network(save(once, tmp_path / "twice.safetensors"))
    first, second = in_8_bits(once.state_dict()), in_8_bits(twice.state_dict())
    assert all(first[name].equal(second[name]) for name in first if first[name].dtype == torch.int8)


def test_a_row_of_zeros_stays_zero() -> None:
    packed = in_8_bits({"w": torch.zeros(2, 3)})
    assert packed["w"].equal(torch.zeros(2, 3, dtype=torch.int8))
    assert packed["w.row_scale"].isfinite().all()


def test_other_formats_get_float16(network: WanTransformer, tmp_path: Path) -> None:
    small = save(network, tmp_path / "small.safetensors")
    convert(small, tmp_path / "folder", "diffusers")
    own = load_network(small).state_dict()
    for name, tensor in load_network(tmp_path / "folder").state_dict().items():
        assert tensor.equal(own[name]), name


def test_8_bits_without_their_scale_are_refused(network: WanTransformer, tmp_path: Path) -> None:
    packed = in_8_bits(network.state_dict())
    name = next(name for name in packed if name.endswith(".row_scale"))
    del packed[name]
    path = tmp_path / "cut.safetensors"
    save_file(packed, path, METADATA)
    with pytest.raises(WeightsError, match="quantised, which is not supported"):
        load_network(path)


def test_what_is_shipped_is_small() -> None:
    """Catches a rebuild that ships float16: five networks would not fit into the repository."""
    last = {asset: config for config, _, assets in STAGES for asset in assets.values()}
    for asset, config in last.items():
        trained = load_config(config)
        wanted = "int8" if stage_of(trained).trains_transformers else "float16"
        assert trained.checkpoint.export == wanted, config
        assert shipped(f"assets/tiny/{asset}.safetensors").stat().st_size < 2e6
    assert sum(path.stat().st_size for path in shipped("assets").rglob("*")) < 12e6
