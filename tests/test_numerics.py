"""What bfloat16 costs, and that the parts which docs/numerics.md promises in more bits have them.

Measured bounds: on one thread of a CPU; other kernels add in another order, which moves errors by a
few per cent.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from golden_weights import golden, golden_network
from torch import Tensor, nn
from torch.nn.functional import layer_norm, rms_norm

from selfforcing_dfd import rng
from selfforcing_dfd.context import Attention, ChunkContext, Conditioning
from selfforcing_dfd.flow import add_noise, x0_from_flow
from selfforcing_dfd.models.attention import load_kernel
from selfforcing_dfd.models.layers import ParameterFreeNorm, add_gated, modulate
from selfforcing_dfd.models.rope import rotary_angles, rotary_tables, rotate
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.objectives import Matching, distribution_matching, flow_matching

BF16, DIM, FRAMES = torch.bfloat16, 48, 3
HALF_ULP = 2.0**-9  # of bfloat16, relative: the least that rounding once can cost
SHAPES = [(96, 96, 2, 24), (48, 300, 2, 128), (1, 513, 4, 64), (130, 1, 1, 128)]
"""Query tokens, key tokens, heads, head_dim: a clip, a chunk with its past, one query, one key."""


def relative(ours: Tensor, exact: Tensor) -> float:
    return float((ours.detach().double() - exact.double()).norm() / exact.double().norm())


def cast(network: WanTransformer, dtype: torch.dtype) -> WanTransformer:
    """All parameters in dtype."""
    nn.Module.to(network, dtype)
    return network.requires_grad_(False)


def flow(dtype: torch.dtype, start_frame: int = 0) -> Tensor:
    """The golden network's flow with weights in dtype.

    Inputs are float32, or float64 for the exact flow.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, t, text = (golden("bidirectional")[name].to(wide) for name in ("x", "t", "text"))
    return cast(golden_network(), dtype)(
        x, t / 1000, Conditioning(text), ChunkContext((), start_frame)
    ).flow


def matching(dtype: torch.dtype, case: str, anchor: str) -> tuple[Matching, Tensor]:
    """Distribution matching with scores in dtype; returns d loss / d x0 as well.

    Latents are float32, or float64 for the exact result.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    data = {
        name: value.to(wide)
        for name, value in golden("losses").items()
        if value.is_floating_point()
    }
    x0 = data["x_gen"].clone().requires_grad_()
    result = distribution_matching(
        x0,
        data[anchor],
        data["eps"],
        data[f"{case}/t"] / 1000,
        teacher=cast(golden_network("weights_teacher"), dtype),
        fake=cast(golden_network("weights_fake"), dtype),
        conditioning=Conditioning(data["cond"]),
        negative=Conditioning(data["uncond"]),
        guidance=4.0,
    )
    return result, torch.autograd.grad(result.loss.sum(), x0)[0]


def tokens(name: str, *shape: int) -> Tensor:
    """Standard normal values that bfloat16 holds exactly."""
    return rng.normal(shape, 0, name).to(BF16)


def exact_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention on [B, tokens, heads, head_dim] in the tensors' own dtype, step by step."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def check_attention(
    kernel: Attention, shape: Sequence[int], dtype: torch.dtype, device: str
) -> tuple[float, float]:
    """Check that a kernel has at most twice the error of the same dtype rounded at every step.

    Errors are against float64, on the same rounded inputs. Half an ulp of the largest value is
    allowed on top, since where a row has one key the step-by-step result is exact. Returns both
    errors, the kernel's first.
    """
    num_queries, num_keys, heads, head_dim = shape
    q, k, v = (
        rng.normal((2, length, heads, head_dim), 0, name).to(device, dtype)
        for name, length in (("q", num_queries), ("k", num_keys), ("v", num_keys))
    )
    exact = exact_attention(q.double(), k.double(), v.double())
    ours, plain = (
        (out.double() - exact).abs().max() for out in (kernel(q, k, v), exact_attention(q, k, v))
    )
    assert ours <= 2 * plain + torch.finfo(dtype).eps / 2 * exact.abs().max(), (ours, plain)
    return float(ours), float(plain)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
def test_attention_on_the_cpu_keeps_the_rule_of_twice_the_error(shape, dtype):
    """Catches a kernel with a slightly wrong scale, layout or accumulation.

    A fixed tolerance would not notice.
    """
    check_attention(load_kernel("sdpa", torch.device("cpu")), shape, dtype, "cpu")


@pytest.mark.parametrize(
    "broken",
    [
        lambda q, k, v: exact_attention(q * 1.02, k, v),
        lambda q, k, v: exact_attention(q, k[:, :-1], v[:, :-1]),
        lambda q, k, v: exact_attention(q.to(torch.float8_e4m3fn).to(q), k, v),
    ],
    ids=["scale off by 2 %", "last key lost", "queries in 8 bits"],
)
def test_the_rule_sees_small_faults(broken):
    """Catches a rule too wide to be one."""
    with pytest.raises(AssertionError):
        check_attention(broken, SHAPES[0], BF16, "cpu")


def test_float32_is_float64_to_rounding():
    """Catches a part left in 16 bits: two layers of some 40 roundings at 6e-8 leave 2.4e-7."""
    assert relative(flow(torch.float32), flow(torch.float64)) < 1e-6


def test_bfloat16_is_float32_within_its_rounding():
    """Catches an overflow, a sum of squares or a difference in 16 bits.

    Measured 7.4e-3: rounding weights (HALF_ULP / sqrt(3) = 1.1e-3 each), inputs, and the outputs of
    some 40 operations. From below: a network that had quietly stayed in float32 would be 2.4e-7
    away.
    """
    ours = flow(BF16)
    assert ours.dtype == BF16
    assert HALF_ULP < relative(ours, flow(torch.float32)) < 1.2e-2


@pytest.mark.parametrize("start_frame", [77, 5003, 987_654])
def test_rounding_does_not_grow_with_position(start_frame):
    """Catches angles in float32 or bfloat16.

    At frame 5003 bfloat16 rotates keys by arbitrary amounts (error .6). Without context nothing
    depends on where the first frame is, so the exact result is that of frame 0.
    """
    exact = flow(torch.float64)
    assert relative(flow(torch.float64, start_frame), exact) < 1e-9
    assert relative(flow(torch.float32, start_frame), exact) < 1e-6
    assert relative(flow(BF16, start_frame), exact) < 1.2e-2


def test_rotation_of_half_precision_is_rounded_once():
    """Catches tables in bfloat16: a quarter of all values would be rounded otherwise."""
    angles, q = rotary_angles(5000, 2, 3, 4, 16)[:, None], tokens("q", 1, 24, 2, 16)
    exact = rotate(q.double(), *rotary_tables(angles, torch.float64))
    assert torch.equal(rotate(q, *rotary_tables(angles, torch.float32)), exact.to(BF16))


def test_gated_residual_sums_are_rounded_once():
    """Catches product and sum that are rounded separately, as in Self-Forcing.

    23 % of all values would differ.
    """
    x, y, gate = tokens("x", 2, 24, DIM), tokens("y", 2, 24, DIM), tokens("gate", 2, FRAMES, DIM)
    frames = (FRAMES, -1)
    exact = (
        x.double().unflatten(1, frames)
        + y.double().unflatten(1, frames) * gate.double()[:, :, None]
    )
    assert torch.equal(add_gated(x, y, gate), exact.flatten(1, 2).to(BF16))


def test_layer_norm_and_modulation_are_float32():
    """Catches LayerNorm in bfloat16, 1.7e-3 off; float32 statistics and products leave 6e-8."""
    x, shift, scale = (
        tokens("x", 2, 24, DIM),
        tokens("shift", 2, FRAMES, DIM),
        tokens("scale", 2, FRAMES, DIM),
    )
    ours = modulate(ParameterFreeNorm(DIM, 1e-6)(x), scale, shift)
    normed = layer_norm(x.double(), (DIM,), eps=1e-6).unflatten(1, (FRAMES, -1))
    assert ours.dtype == torch.float32
    assert (
        relative(
            ours, (normed * scale.double()[:, :, None] + shift.double()[:, :, None]).flatten(1, 2)
        )
        < 3e-7
    )


def test_query_and_key_norms_are_rounded_once():
    """Catches a mean of squares in bfloat16, good to two digits."""
    norm = cast(golden_network(), BF16).wan_blocks()[0].attn1.norm_q
    x = tokens("x", 2, 24, DIM)
    assert torch.equal(norm(x), rms_norm(x.double(), (DIM,), norm.weight.double(), 1e-6).to(BF16))


def test_noise_levels_do_not_pass_through_bfloat16():
    """Catches a timestep in 16 bits, as in Causal-Forcing.

    937.5 would be 936, a different point of the ladder.
    """
    network, exact = cast(golden_network(), BF16), cast(golden_network(), torch.float64)
    near, far = (
        exact.condition_embedder.time(torch.tensor([[t / 1000]]).double())[0]
        for t in (937.5, 936.0)
    )
    ours = network.condition_embedder.time(torch.tensor([[0.9375]]))[0]
    assert relative(ours, near) < 2e-2
    assert relative(far, near) > 5 * relative(ours, near)


def test_clean_predictions_and_noise_stay_in_float32():
    """Catches x0 in bfloat16 between the steps of a rollout, whose errors add up."""
    data = golden("losses")
    x_t = add_noise(data["x_gen"], data["eps"], 0.02)
    v = (data["eps"] - data["x_gen"]).to(BF16)
    x0 = x0_from_flow(x_t, v, 0.02)
    assert x_t.dtype == x0.dtype == torch.float32
    assert relative(x0, x_t.double() - 0.02 * v.double()) < 1e-7


@pytest.mark.parametrize("case", ["case0", "case1"])
@pytest.mark.parametrize("anchor", ["x_gen", "x_real"])
def test_matching_with_scores_in_bfloat16(case, anchor):
    """Catches a loss or normaliser in 16 bits. Noise levels .73 and .02, .98 and .41.

    Direction: measured 5e-4 (DFD at .02) to 1.8e-2; guidance 4 doubles the flows' own 7.6e-3.
    Normaliser: 1e-3, a mean over errors of both signs. In float32: 3e-6.
    """
    exact, direction = matching(torch.float64, case, anchor)
    half, half_direction = matching(BF16, case, anchor)
    _, full_direction = matching(torch.float32, case, anchor)
    assert {half.loss.dtype, half.normaliser.dtype, half_direction.dtype} == {torch.float32}
    assert relative(half_direction, direction) < 3e-2
    assert relative(half.normaliser, exact.normaliser) < 3e-3
    assert relative(full_direction, direction) < 1e-5


def test_the_fake_scores_loss_is_float32():
    """Catches a squared difference in bfloat16, or its target rounded.

    2e-3 is the flows' error, averaged.
    """
    data = golden("losses")
    sigma, text = data["case0/t"] / 1000, Conditioning(data["cond"])
    half, full = (
        flow_matching(
            cast(golden_network("weights_fake"), dtype), data["x_gen"], data["eps"], sigma, text
        )
        for dtype in (BF16, torch.float32)
    )
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=2e-3, atol=0)


@pytest.mark.parametrize("page", ["numerics", "differences"])
def test_tests_that_the_documents_name_exist(page):
    """Catches a promise whose test was renamed or removed."""
    tests = Path(__file__).parent
    code = "".join(path.read_text() for path in tests.rglob("test_*.py"))
    cited = re.findall(
        r"`((?:\w+/)?test_\w+(?:\.py)?)`", (tests.parent / "docs" / f"{page}.md").read_text()
    )
    files = {name for name in cited if name.endswith(".py")}
    assert {name for name in files if not (tests / name.removeprefix("tests/")).is_file()} == set()
    assert {name for name in set(cited) - files if f"def {name}(" not in code} == set()
    assert cited
