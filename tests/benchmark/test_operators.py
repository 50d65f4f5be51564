"""Operators and bytes of the VAE's decoder, counted on shapes; and the counter, by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch
from inductor_plan import Plan, planned, use_fake_weights
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import rms_norm

from selfforcing_dfd.benchmark.operators import Work, decoder_work, meta_codec, work_of
from selfforcing_dfd.cli.main import main
from selfforcing_dfd.codecs.wan_decode import Programs, build_rooms

SIZE = (480, 832)
BEFORE = Work(442, 92_163_469_888)
"""Of a latent frame in bfloat16, by this counter, before the decoder was made leaner."""
NOW = Work(130, 23_250_000_000)
"""Of the same frame, at most; docs/speed.md says so."""
SMALL = {"base_dim": 16, "dim_mult": [1, 2], "num_res_blocks": 0, "temperal_downsample": [True]}


def test_the_counter_by_hand():
    """Catches views that count, outputs counted twice, and products whose bytes count."""
    x = torch.empty(4, 6, device="meta")
    size = x.nbytes
    column = torch.empty(4, 1, device="meta")

    def counted(call: Callable[[], object]) -> tuple[int, int]:
        work = work_of(call)
        return work.operators, work.num_bytes

    assert counted(lambda: x.T.unsqueeze(0)) == (0, 0)
    assert counted(lambda: torch.empty_like(x)) == (0, 0)
    assert counted(lambda: x + 1) == (1, 2 * size)
    assert counted(lambda: (x + 1).mul(2)) == (2, 4 * size)
    assert counted(lambda: x + column.expand(4, 6)) == (1, 2 * size + column.nbytes)
    assert counted(lambda: x.neg_()) == (1, 2 * size)
    assert counted(lambda: x[:2].copy_(x[2:])) == (1, size)
    assert counted(lambda: torch.ops.aten.silu.out(x, out=torch.empty_like(x))) == (1, 2 * size)
    assert counted(lambda: torch._foreach_copy_([x, x], [x, x])) == (1, 4 * size)
    assert counted(lambda: x @ x.T) == (1, 0)
    assert counted(lambda: rms_norm(x, (6,))) == (1, 2 * size)


def test_a_latent_frame_costs_a_third_of_what_it_did():
    """Catches a norm taken apart again, frames copied between caches and rooms, and float32."""
    work = decoder_work(SIZE, torch.bfloat16)
    assert 3 * work["ours"].operators <= BEFORE.operators
    assert 3 * work["ours"].num_bytes <= BEFORE.num_bytes
    assert work["ours"].operators <= NOW.operators
    assert work["ours"].num_bytes <= NOW.num_bytes
    assert work["diffusers"].operators >= BEFORE.operators
    assert work["diffusers"].num_bytes >= BEFORE.num_bytes


def test_the_command_counts(capsys):
    """Catches a size or a dtype that the command does not pass on, and a model that is loaded."""
    command = ["benchmark", "--count-decoder", "--size", "16x32", "--dtype", "float32"]
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["ours"] == asdict(decoder_work((16, 32), torch.float32)["ours"])


def compiled(size: tuple[int, int], config: dict[str, object]) -> Plan:
    """Of a later latent frame after compilation, in bfloat16 and channels_last."""
    codec = meta_codec(torch.bfloat16, config)
    decoder = codec.vae.decoder
    with FakeTensorMode(), torch.no_grad():
        use_fake_weights(decoder)
        x: Tensor = torch.empty(1, codec.channels, 1, *size, dtype=codec.dtype)
        rooms = build_rooms(decoder, x, codec.memory_format)
        return planned(lambda: Programs().compiled().later(decoder, x, rooms))


def around_a_program() -> Work:
    """What a later latent frame costs outside of its compiled graph."""
    codec = meta_codec(torch.bfloat16)

    def program(decoder: object, x: Tensor, rooms: list[Tensor]) -> Tensor:
        return x.new_empty(1, 3, 4, *SIZE)

    codec.programs = Programs(first=program, later=program)
    decoder = codec.start_decoding()
    latents = torch.empty(1, 1, codec.channels, 60, 104, device="meta")
    decoder.decode(latents)
    return work_of(lambda: decoder.decode(latents))


def test_compilation_fuses_norm_silu_and_the_store_into_a_room():
    """Catches code that inductor cannot fuse: a room copied whole, a norm of several kernels.

    Written by inductor: nine times norm, SiLU and store; the norm before attention; two stores
    without norm; frames doubled together with rows. Called: twelve convolutions, attention and its
    two linear layers.
    """
    plan = compiled((8, 8), SMALL)
    assert plan.written.operators <= 9 + 1 + 2 + 1
    assert plan.called <= 12 + 3


@pytest.mark.soak
def test_a_compiled_latent_frame_costs_a_quarter():
    """Catches the same at true size, where inductor could decide otherwise."""
    plan = compiled((60, 104), {})
    work = plan.written + around_a_program()
    assert 4 * (work.operators + plan.called) <= BEFORE.operators
    assert 4 * work.num_bytes <= BEFORE.num_bytes
