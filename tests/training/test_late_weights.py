"""Weights that are read when networks are sharded: the same bits, and no process holds them all."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo import in_processes
from measured import count_exactly, forget_peak, status
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import save_network

from selfforcing_dfd.config import NetworkConfig
from selfforcing_dfd.processes.world import find_world
from selfforcing_dfd.stages.base import Start
from selfforcing_dfd.training.agreement import DisagreementError, norms_of
from selfforcing_dfd.training.build import build_network, build_trainer, load_start
from selfforcing_dfd.training.late_weights import WholeWeights, fill, without_memory
from selfforcing_dfd.training.sharding import Sharding
from selfforcing_dfd.weights.stored import WeightsError
from selfforcing_dfd.weights.tensors import model_fingerprint, whole
from tests.training.conftest import config_in

# 27.6 million parameters: 110 MB in float32
LARGE = NetworkConfig(num_heads=4, head_dim=128, num_layers=6, ffn_dim=2048, text_dim=32)


def filled(start: Start, dtype: torch.dtype, ranks: int) -> tuple[Any, WholeWeights]:
    """A network that is sharded first and read afterwards."""
    network = without_memory(start, dtype)
    Sharding(find_world("cpu"), ranks).apply(network, is_trained=False)
    return network, fill(network, start, torch.device("cpu"))


@pytest.mark.parametrize(("dtype", "ranks"), [(torch.float32, 0), (torch.bfloat16, 1)])
def test_weights_are_those_of_a_whole_network(
    dtype: torch.dtype, ranks: int, world: Path, tmp_path: Path
) -> None:
    """Catches a part of another tensor, a part twice, and a norm or fingerprint of one's part."""
    start = Start(str(world / "teacher.safetensors"))
    wanted = load_start(start, "cpu", dtype)

    def read() -> tuple[dict[str, torch.Tensor], WholeWeights, list[bool]]:
        network, seen = filled(start, dtype, ranks)
        parts = [parameter.to_local().numel() for parameter in network.parameters()]
        tensors = {name: whole(parameter) for name, parameter in network.named_parameters()}
        is_part = [part < tensors[name].numel() for name, part in zip(tensors, parts, strict=True)]
        return tensors, seen, is_part

    for tensors, seen, is_part in in_processes(2, tmp_path / "two", read):
        assert any(is_part) == (ranks == 0)
        assert tensors.keys() == wanted.state_dict().keys()
        for name, tensor in wanted.state_dict().items():
            assert torch.equal(tensors[name], tensor), name
        assert seen.fingerprint == model_fingerprint(wanted)
        (norm,) = norms_of({"teacher": wanted}).values()
        assert seen.norm == pytest.approx(norm, rel=1e-12)  # summed in another order


def test_weights_that_are_not_finite_are_refused(world: Path, tmp_path: Path) -> None:
    """Catches a NaN that a whole read would have refused."""
    with safe_open(world / "teacher.safetensors", "pt") as file:
        notes = file.metadata()
    tensors = load_file(world / "teacher.safetensors")
    tensors["proj_out.weight"][0, 0] = torch.nan
    path = tmp_path / "teacher.safetensors"
    save_file(tensors, path, notes)
    late = without_memory(Start(str(path)), torch.float32)
    with pytest.raises(WeightsError, match=r"proj_out\.weight"):
        fill(late, Start(str(path)), torch.device("cpu"))


@pytest.mark.soak  # beside other tests in one process, their memory counts too
def test_no_process_holds_a_whole_network(world: Path, tmp_path: Path) -> None:
    """Catches weights that are read whole before they are shared.

    Of 110 MB each of two processes keeps 55, and one whole tensor of 6 at a time. Measured: 67 MB,
    and 119 where the network is read before it is shared.
    """
    network = build_network(LARGE)
    network.init_weights(torch.Generator().manual_seed(0))
    path = tmp_path / "large.safetensors"
    save_network(path, network)
    size = sum(parameter.nbytes for parameter in network.parameters())
    del network
    gc.collect()  # else processes would reuse its memory

    def read() -> int:
        count_exactly()
        # what is imported at first use belongs to no network
        filled(Start(str(world / "teacher.safetensors")), torch.float32, 0)
        forget_peak()
        before = status("VmHWM")
        filled(Start(str(path)), torch.float32, 0)
        return status("VmHWM") - before

    for peak in in_processes(2, tmp_path / "two", read):
        assert 0.45 * size < peak < 0.8 * size


def test_processes_that_read_other_weights_are_told(world: Path, tmp_path: Path) -> None:
    """Catches halves of two networks joined to one, where a file differs between machines."""
    for machine in ("0", "1"):
        network = load_start(Start(str(world / "teacher.safetensors")))
        with torch.no_grad():
            network.proj_out.weight += int(machine)
        (tmp_path / machine).mkdir()
        save_network(tmp_path / machine / "teacher.safetensors", network)
    settings = ["run.stage=dmd", "batch.micro=1", "weights.teacher=teacher.safetensors"]
    config = config_in(tmp_path, world, *settings)

    def differ() -> str:
        os.chdir(tmp_path / str(find_world("cpu").rank))
        with pytest.raises(DisagreementError) as error:
            build_trainer(config)
        return str(error.value)

    for message in in_processes(2, tmp_path / "two", differ):
        assert "norm of the teacher's weights: rank 1" in message
