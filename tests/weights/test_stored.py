"""Damaged, incomplete, malicious or foreign files, refused with advice; and memory."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import TINY, tiny_network
from wan_files import same, sharded_folder, wan_state

from selfforcing_dfd.models.identity import SELF_FORCING, Identity
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.training.checkpoint import CheckpointManager
from selfforcing_dfd.training.ema import EMA
from selfforcing_dfd.weights.read import StoredWeights, WeightsError, load_network, read_weights
from selfforcing_dfd.weights.stored import StoredTensor, is_torch_file, read_safetensors, stored
from selfforcing_dfd.weights.write import convert, network_config


def test_a_missing_shard_is_named(tmp_path):
    """Catches a download that stopped half way."""
    folder = sharded_folder(tmp_path / "w")
    second = folder / "diffusion_pytorch_model-00002-of-00003.safetensors"
    second.rename(tmp_path / "away")
    with pytest.raises(WeightsError, match=f"1 of 3 shards are missing, first {second.name}"):
        read_weights(folder)
    (folder / "diffusion_pytorch_model.safetensors.index.json").unlink()
    with pytest.raises(WeightsError, match=f"1 of 3 shards are missing, first {second.name}"):
        read_weights(folder)


def test_files_beside_the_indexed_ones_are_refused(tmp_path):
    """Catches old shards mixed with new ones, or one of two precisions taken at random."""
    folder = sharded_folder(tmp_path / "w")
    save_file(wan_state(), folder / "diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(WeightsError, match=r"fp16.safetensors besides the 3 files"):
        read_weights(folder)


def test_an_index_must_agree_with_its_shards(tmp_path):
    """Catches shards of two models in one folder, and an index of files from elsewhere."""
    folder = sharded_folder(tmp_path / "w")
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text())
    first, second = sorted(set(content["weight_map"].values()))[:2]
    key = next(key for key, name in content["weight_map"].items() if name == first)
    for change, message in (
        ({key: second}, f"puts {key} into {second}, but it is in {first}"),
        (
            {"blocks.9.ffn.net.2.bias": first},
            r"disagree about 1 tensors, first blocks.9.ffn.net.2.bias",
        ),
        ({key: f"../{first}"}, "not in its folder; do not trust"),
    ):
        index.write_text(json.dumps({"weight_map": content["weight_map"] | change}))
        with pytest.raises(WeightsError, match=message):
            read_weights(folder)
    index.write_text("<html>")
    with pytest.raises(WeightsError, match="is no index of shards"):
        read_weights(folder)


@pytest.mark.parametrize("kept", [4, 2000, -1])
def test_a_truncated_safetensors_file(kept, tmp_path):
    """Catches reading what is not there: header cut, tensors cut, last byte gone."""
    save_file(wan_state(), tmp_path / "w.safetensors")
    content = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(content[:kept])
    with pytest.raises(WeightsError, match="truncated or no safetensors file"):
        read_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize("new_form", [True, False])
@pytest.mark.parametrize("kept", [10, 5000, -200])
def test_an_incomplete_torch_file(kept, new_form, tmp_path):
    """Catches a cut download reported as "invalid argument", or without its size and a cure."""
    path = tmp_path / "w.pt"
    torch.save(wan_state(), path, _use_new_zipfile_serialization=new_form)
    content = path.read_bytes()[:kept]
    path.write_bytes(content)
    said = rf"w.pt is incomplete: it has {len(content):,} bytes, .* Download or copy it again"
    with pytest.raises(WeightsError, match=said):
        read_weights(path)


def test_a_pointer(tmp_path):
    """Catches a clone without Git LFS reported as something else."""
    (tmp_path / "w.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    )
    with pytest.raises(WeightsError, match="git lfs pull"):
        read_weights(tmp_path / "w.safetensors")


class Malice:
    """Unpickled, it would make a folder."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["torch", "old torch", "pickle"])
def test_a_malicious_pickle_is_refused_and_not_run(form, tmp_path):
    """Catches weights_only=False, and the fallback to it that other loaders have."""
    content = {"generator": wan_state(), "step": Malice(tmp_path / "harm")}
    path = tmp_path / "w.pt"
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(WeightsError, match="refused") as caught:
        read_weights(path)
    assert form == "pickle" or (
        "posix.mkdir" in str(caught.value) and "safetensors" in str(caught.value)
    )
    assert not (tmp_path / "harm").exists()


def test_what_is_no_transformer_is_refused(tmp_path):
    """Catches a VAE, a text encoder or a wrong folder loaded as far as it goes."""
    save_file({"encoder.conv1.weight": torch.ones(2)}, tmp_path / "vae.safetensors")
    with pytest.raises(
        WeightsError, match=r"holds no Wan transformer: its tensors are encoder.conv1.weight"
    ):
        read_weights(tmp_path / "vae.safetensors")
    with pytest.raises(WeightsError, match=r"does not exist.* hf download"):
        read_weights(tmp_path / "nothing")
    with pytest.raises(WeightsError, match=r"no config.json .* but vae.safetensors"):
        read_weights(tmp_path)
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    with pytest.raises(WeightsError, match="holds Tensor; wanted: a state dict"):
        read_weights(tmp_path / "tensor.pt")
    mixed = wan_state() | {"proj_out.weight": torch.ones(2)}
    save_file(mixed, tmp_path / "mixed.safetensors")
    with pytest.raises(WeightsError, match="mixes names"):
        read_weights(tmp_path / "mixed.safetensors")
    quantised = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in wan_state().items()}
    save_file(quantised, tmp_path / "fp8.safetensors")
    with pytest.raises(WeightsError, match="quantised"):
        read_weights(tmp_path / "fp8.safetensors")


def training_checkpoint(folder: Path) -> Path:
    """As the trainer saves them: seed 0 is the average, 1 the student, 2 the fake score."""
    average, student, fake = (tiny_network(seed, torch.float32) for seed in range(3))
    networks = {
        "student": network_config(student.config, Identity("causal_student", SELF_FORCING)),
        "fake": network_config(fake.config, Identity("fake_score")),
    }
    manager = CheckpointManager(folder, config={"networks": networks})
    return manager.save(7, {"ema": EMA(average, 0.9), "student": student, "fake": fake})


def test_a_training_checkpoint_holds_three_models(tmp_path):
    """Catches a stopped run whose student cannot be read, and the fake score in its place."""
    path = training_checkpoint(tmp_path)
    same(load_network(path))
    same(load_network(path, entry="student"), wan_state(1))
    same(load_network(path, entry="fake"), wan_state(2))
    assert [read_weights(path, entry).role for entry in ("", "student", "fake")] == [
        "causal_student",
        "causal_student",
        "fake_score",
    ]


def test_a_pickle_in_a_checkpoint_is_refused(tmp_path):
    """Catches the pickled index of torch.distributed.checkpoint, which could run any program."""
    path = training_checkpoint(tmp_path)
    (path / ".metadata").write_bytes(pickle.dumps(Malice(tmp_path / "harm")))
    with pytest.raises(WeightsError, match=r"\.metadata was not written with it"):
        read_weights(path)
    assert not (tmp_path / "harm").exists()


PEAK = """
import sys
import torch
from selfforcing_dfd.weights.read import load_network

def kilobytes(name):
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith(name)).split()[1])

load_network(sys.argv[1])  # what a first call loads besides weights
before = kilobytes("VmRSS")
network = load_network(sys.argv[2])
print(1024 * (kilobytes("VmHWM") - before), network.scale_shift_table[0, 0, 0].item())
"""


def test_loading_holds_one_copy(tmp_path):
    """Catches a state dict or mapped files beside the network: a peak of twice the weights.

    Counted are all resident pages of the process, with those of mapped files, above those before
    the load.
    """
    sizes: dict[str, Any] = {
        "num_attention_heads": 12,
        "attention_head_dim": 128,
        "num_layers": 2,
        "text_dim": 64,
    }
    with torch.device("meta"):
        shapes = {
            name: tensor.shape for name, tensor in WanTransformer(**sizes).state_dict().items()
        }

    def tensor(name: str) -> StoredTensor:
        return StoredTensor(
            name, tuple(shapes[name]), torch.bfloat16, lambda: torch.ones(shapes[name]).bfloat16()
        )

    weights = StoredWeights(
        "made here", "made here", "diffusers", {name: tensor(name) for name in shapes}
    )
    done = convert(weights, tmp_path / "wide", "diffusers", max_shard_bytes=60_000_000)
    assert done.num_files > 4 and done.num_bytes > 200e6
    small = StoredWeights(
        "tiny", "tiny", "wan", {n: stored(n, t) for n, t in tiny_network().state_dict().items()}
    )
    convert(small, tmp_path / "small", "diffusers", head_dim=TINY["attention_head_dim"])
    command = [sys.executable, "-c", PEAK, str(tmp_path / "small"), str(tmp_path / "wide")]
    ran = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    peak, value = map(float, ran.stdout.split())
    assert value == 1
    assert peak < 1.3 * done.num_bytes, f"peak of {peak / done.num_bytes:.2f} copies"


@pytest.mark.parametrize("padding", range(0, 256, 8))
def test_a_header_of_any_length_is_that_of_safetensors(padding: int, tmp_path: Path):
    """Catches a file whose header is 128 bytes long, say, taken for one of torch.save."""
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.zeros(1)}, path, metadata={"about": "x" * padding})
    assert not is_torch_file(path)
    tensors, _ = read_safetensors(path)
    assert list(tensors) == ["w"]
