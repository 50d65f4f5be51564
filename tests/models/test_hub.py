"""What `from_pretrained` may take for a student, and adapters by every name that is in use."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny_models import TINY, conditioning, fill_weights, latents

from selfforcing_dfd import rng
from selfforcing_dfd.common import UserError
from selfforcing_dfd.models.hub import HubError
from selfforcing_dfd.models.identity import SELF_FORCING, Recipe, mark, recipe_of, role_of
from selfforcing_dfd.models.lora import AdapterError
from selfforcing_dfd.models.wan import WanTransformer

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
ORIGINAL = {  # diffusers' names of the adapted modules -> original Wan's
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}


def network(**sizes: Any) -> Any:
    made = WanTransformer(**{**TINY, **sizes})
    fill_weights(made, 0)
    return made.requires_grad_(False)


def flow(model: Any) -> torch.Tensor:
    """float32 output for fixed input. Text is prepared again, as adapters change its keys."""
    text = conditioning(dtype=torch.float32)
    return model(latents("x", dtype=torch.float32), 0.7, text).flow


@pytest.fixture
def student(tmp_path: Path) -> Path:
    """A folder as we save it."""
    made = network()
    mark(made, "causal_student", Recipe(ladder=(1000, 500), shift=3.0, chunk_frames=2, frames=6))
    made.save_pretrained(tmp_path / "student")
    return tmp_path / "student"


@pytest.fixture
def wan(tmp_path: Path) -> Path:
    """A folder as diffusers saves Wan's own, bidirectional transformer.

    Its parent has the repository's name.
    """
    twin = WanTransformer3DModel(**TINY)
    fill_weights(twin, 0)
    twin.save_pretrained(tmp_path / "wan" / "transformer")
    return tmp_path / "wan"


def test_a_student_comes_back_as_it_was(student):
    """Catches bits, or what the student is and wants, that a save loses."""
    again = WanTransformer.from_pretrained(student, local_files_only=True)
    wanted = network().state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in again.state_dict().items())
    assert role_of(again.config) == "causal_student"
    assert recipe_of(again.config) == Recipe((1000, 500), 3.0, 2, 6)


def test_a_second_save_says_the_same(student, tmp_path):
    """Catches a student that forgets on its way through a second folder what it is."""
    WanTransformer.from_pretrained(student).save_pretrained(tmp_path / "again")
    first, second = (
        json.loads((folder / "config.json").read_text()) for folder in (student, tmp_path / "again")
    )
    second.pop("_name_or_path")  # where it was loaded from, which diffusers adds
    assert first == second


def test_options_are_those_of_diffusers(wan, student):
    """Catches torch_dtype, subfolder or output_loading_info swallowed on their way."""
    teacher = WanTransformer.from_pretrained(
        wan, teacher=True, subfolder="transformer", torch_dtype=torch.bfloat16
    )
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.bfloat16}
    _, report = WanTransformer.from_pretrained(student, output_loading_info=True)
    assert report["missing_keys"] == []


def test_wans_own_transformer_is_no_student(wan):
    """Catches the bidirectional teacher streamed as a student.

    Its shapes and keys are a student's.
    """
    with pytest.raises(
        HubError, match=r"bidirectional.*student=PATH.*\"role\": \"causal_student\".*teacher=True"
    ):
        WanTransformer.from_pretrained(wan, subfolder="transformer")


def test_a_teacher_that_was_saved_again_is_no_student(wan, tmp_path):
    """Catches a role that our own class's name in the config covers up."""
    WanTransformer.from_pretrained(wan / "transformer", teacher=True).save_pretrained(
        tmp_path / "again"
    )
    with pytest.raises(HubError, match="holds Wan's bidirectional"):
        WanTransformer.from_pretrained(tmp_path / "again")


def test_a_student_is_no_teacher(student):
    """Catches the student as its own teacher, whose loss looks healthy."""
    with pytest.raises(HubError, match="holds a causal student; leave teacher=True out"):
        WanTransformer.from_pretrained(student, teacher=True)


def test_weights_without_a_role_are_refused(tmp_path):
    """Catches a guess where nothing is known."""
    network().save_pretrained(tmp_path)
    with pytest.raises(HubError, match="does not say whether"):
        WanTransformer.from_pretrained(tmp_path)


def test_a_note_makes_a_student(wan):
    """Catches an error whose cure does not cure."""
    path = wan / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "role": "causal_student"}))
    again = WanTransformer.from_pretrained(wan, subfolder="transformer")
    assert role_of(again.config) == "causal_student"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "WanModel", "dim": 32}, "original Wan layout.*load_network"),
        ({"role": "causal_student", "image_dim": 1280}, "no Wan2.1 model has image_dim 1280"),
        ({"role": "causal_student", "num_layers": 3}, "missing, first blocks.2"),
        ({"role": "causal_student", "num_layers": 1}, "unexpected, first blocks.1"),
    ],
)
def test_other_models_are_refused(wan, changes, message):
    """Catches random weights for missing tensors, and image-to-video without its image.

    diffusers only warns about missing tensors.
    """
    path = wan / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=message):
        WanTransformer.from_pretrained(wan, subfolder="transformer")


def test_diffusers_reads_our_folder(student):
    """Catches exports that only we can read. The two notes are ignored there."""
    twin = WanTransformer3DModel.from_pretrained(student)
    wanted = network().state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in twin.state_dict().items())


@pytest.mark.parametrize(
    "recipe", [{"steps": 4}, {"ladder": [500, 250]}, {"chunk_frames": 0}, {"sink": 1}]
)
def test_recipes_that_cannot_be_are_refused(recipe):
    """Catches a misspelt setting that becomes a default, and a ladder that starts below noise."""
    whole = dataclasses.asdict(SELF_FORCING)
    message = r"known are|must start at 1000|at least one frame|a chunk has 3"
    with pytest.raises(ValueError, match=message):
        recipe_of({"role": "causal_student", "recipe": whole | recipe})


def with_adapter(seed: int = 3) -> Any:
    """A student with an adapter of rank 4 that changes its output.

    alpha differs from the rank, so that it must be kept.
    """
    made = network()
    made.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS))
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.2 * rng.normal(tuple(parameter.shape), seed, f"adapter {name}"))
    return made


def test_a_new_adapter_changes_nothing():
    """Catches a new adapter that is not zero, and module names that LoRA does not find."""
    made = network()
    before = flow(made)
    made.add_adapter(LoraConfig(r=4, target_modules=TARGETS))
    assert torch.equal(flow(made), before)
    assert any("lora_A" in name for name in made.state_dict())


def test_an_adapter_comes_back(tmp_path):
    """Catches an adapter that loads without an error and without effect, or with another scale."""
    adapted = with_adapter()
    adapted.save_lora_adapter(tmp_path)
    fresh = network()
    without = flow(fresh)
    fresh.load_lora_adapter(tmp_path)
    assert torch.equal(flow(fresh), flow(adapted))
    assert not torch.equal(flow(fresh), without)
    fresh.disable_adapters()
    assert torch.equal(flow(fresh), without)


def test_a_fused_adapter_does_the_same(tmp_path):
    """Catches a fuse that forgets the scale or modules.

    float32: 1e-5 is ten roundings of weights of order one.
    """
    adapted = with_adapter()
    wanted = flow(adapted)
    plain = flow(network())
    adapted.fuse_lora()
    assert (flow(adapted) - wanted).abs().max() < 1e-5
    adapted.unfuse_lora()
    assert (flow(adapted) - wanted).abs().max() < 1e-5
    adapted.unload_lora()
    assert (flow(adapted) - plain).abs().max() < 1e-5


def original_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An adapter as those made for the original code are named."""
    renamed = {}
    for name, tensor in tensors.items():
        head, block, rest = name.split(".", 2)
        ours = next(part for part in ORIGINAL if rest.startswith(part))
        renamed[f"diffusion_model.{head}.{block}.{ORIGINAL[ours]}{rest.removeprefix(ours)}"] = (
            tensor
        )
    return renamed


@pytest.mark.parametrize("naming", ["diffusers", "original", "original with alpha", "dict"])
def test_adapters_of_others_load(tmp_path, naming):
    """Catches prefixes and names of which diffusers says `no LoRA keys` and goes on."""
    adapted = with_adapter()
    adapted.save_lora_adapter(tmp_path)
    tensors = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    for name in tensors:
        tensors[name] = tensors[name] * (
            1.5 if "lora_B" in name and naming != "original with alpha" else 1
        )
    if naming == "diffusers":
        tensors = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
    elif naming != "dict":
        tensors = original_names(tensors)
    if naming == "original with alpha":
        for name in [name for name in tensors if "lora_A" in name]:
            tensors[name.replace("lora_A.weight", "alpha")] = torch.tensor(6.0)
    fresh = network()
    source: Any = tensors
    if naming != "dict":
        source = tmp_path / "theirs.safetensors"
        save_file(tensors, source)
    fresh.load_lora_adapter(source)
    assert (flow(fresh) - flow(adapted)).abs().max() < 1e-5, (
        "alpha / rank = 1.5 stands elsewhere: rounding only"
    )


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_layers": 1}, r"first blocks\.1\.\S+: there is no"),
        ({"ffn_dim": 64}, r"\(48, 4\) for 64 values out"),
    ],
)
def test_an_adapter_of_another_size_is_refused(tmp_path, sizes, message):
    """Catches a traceback from the middle of a half-adapted model."""
    with_adapter().save_lora_adapter(tmp_path)
    fresh = network(**sizes)
    with pytest.raises(AdapterError, match=message):
        fresh.load_lora_adapter(tmp_path)
    assert not any("lora" in name for name in fresh.state_dict())


def test_half_an_adapter_is_refused():
    """Catches an IndexError from the inside of diffusers, or an adapter that does nothing."""
    with pytest.raises(AdapterError, match=r"blocks.0.attn1.to_q.lora_B.weight is missing"):
        network().load_lora_adapter(
            {"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.zeros(4, 32)}
        )


def test_pickled_adapters_are_not_read(tmp_path):
    """Catches a file of another format that is guessed to be one."""
    torch.save(
        {"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.zeros(4, 32)},
        tmp_path / "adapter.bin",
    )
    for source, options in (
        (tmp_path, {"weight_name": "adapter.bin"}),
        (tmp_path / "adapter.bin", {}),
    ):
        with pytest.raises(AdapterError, match="no safetensors file"):
            network().load_lora_adapter(source, **options)
