"""diffusers' offloading: parts take turns on a device, and the clip is the same.

There is no GPU here: accelerate's own hooks move the parts from the CPU to the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate.hooks import CpuOffload
from diffusers import DiffusionPipeline
from tiny_pipeline import PROMPT, SIZE, make_pipeline
from tiny_wan import RECIPE

from selfforcing_dfd.context import Conditioning
from selfforcing_dfd.models.network import WanNetwork
from selfforcing_dfd.streaming.for_diffusers import Student, noise_for

PARTS = ["text_encoder", "transformer", "vae"]


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the classes that come to the device, in order, and `-` before what leaves it.

    The device of the last one that came counts as the GPU.
    """
    log: list[str] = []
    present: set[str] = set()
    come = CpuOffload.pre_forward

    def pre_forward(hook: Any, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        before = hook.prev_module_hook
        if before is not None and type(before.model).__name__ in present:
            present.remove(type(before.model).__name__)
            log.append(f"-{type(before.model).__name__}")
        if type(module).__name__ not in present:
            present.add(type(module).__name__)
            log.append(type(module).__name__)
        return come(hook, module, *args, **kwargs)

    monkeypatch.setattr(CpuOffload, "pre_forward", pre_forward)
    yield log


def test_the_parts_take_turns(clip, moves, monkeypatch):
    """Catches a part that is called around its hook, and so computes where its weights are not.

    A chunk's steps, its frames, and the pass that commits it: before the next chunk on a CPU.
    """
    embed = WanNetwork.embed_text

    def embeds(network: WanNetwork, asked: Conditioning) -> torch.Tensor:
        moves.append("embeds the prompt")
        return embed(network, asked)

    monkeypatch.setattr(WanNetwork, "embed_text", embeds)
    pipe = make_pipeline()
    pipe.enable_model_cpu_offload(device="cpu")
    made = pipe(PROMPT, num_frames=21, seed=5, output_type="uint8", **SIZE).frames
    assert torch.equal(made, clip)
    text, transformer, vae = (type(pipe.components[name]).__name__ for name in PARTS)
    assert moves == [
        *(text, f"-{text}", transformer, "embeds the prompt", f"-{transformer}", vae),
        *(transformer, f"-{transformer}"),  # the VAE, small, stays
    ]
    assert pipe._execution_device == torch.device("cpu:0")


def test_a_stream_computes_where_the_hooks_bring_the_parts():
    """Catches keys and values on the CPU, where an offloaded transformer's weights lie."""
    pipe = make_pipeline()
    pipe.enable_model_cpu_offload(device="cpu")
    pipe._offload_device = torch.device("cpu:0")
    model = pipe.stream_model(**SIZE)
    assert model.device == model.decode_device == model.codec.device == torch.device("cpu:0")
    assert model.run_device is not None
    assert make_pipeline().stream_model(**SIZE).run_device is None


def test_the_exports_own_pipeline_takes_turns_too(export, moves):
    """Catches the same in `pipeline.py`, which needs nothing of this package."""
    options = {"custom_pipeline": str(export / "pipeline.py"), "trust_remote_code": True}
    plain = DiffusionPipeline.from_pretrained(export, **options)
    asked = {"height": 32, "width": 48, "generator": torch.Generator().manual_seed(0)}
    wanted = plain(PROMPT, output_type="pt", **asked).frames
    plain.enable_model_cpu_offload(device="cpu")
    asked["generator"].manual_seed(0)
    assert torch.equal(plain(PROMPT, output_type="pt", **asked).frames, wanted)
    text, transformer, vae = (type(plain.components[name]).__name__ for name in PARTS)
    assert moves == [text, f"-{text}", transformer, f"-{transformer}", vae]


def test_the_exports_positions_follow_the_latents(export):
    """Catches rotary tables that stay on the CPU with an offloaded transformer.

    The meta device stands for the GPU: what is there cannot be mixed with what is not.
    """
    options = {"custom_pipeline": str(export / "pipeline.py"), "trust_remote_code": True}
    transformer: Any = DiffusionPipeline.from_pretrained(export, **options).transformer
    text = torch.empty(1, 8, transformer.config.text_dim, device="meta")
    student = Student(transformer, text)
    device = torch.device("meta")
    draws = len(RECIPE.ladder)
    noise = noise_for((draws, 1, 16, 3, 4, 6), device, None)
    student.begin_chunk(0, noise[0])
    assert student.past.rotary is not None
    assert {table.device for table in student.past.rotary} == {device}
