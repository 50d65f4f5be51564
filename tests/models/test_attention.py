"""Which attention kernel is taken where, as a function of what can be known without a GPU."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny_models import latents, tiny_network
from torch import Tensor
from torch.nn.attention import _cur_sdpa_kernel_backends

from selfforcing_dfd import rng
from selfforcing_dfd.context import Conditioning
from selfforcing_dfd.models.attention import (
    KERNELS,
    AttentionError,
    attend,
    check_name,
    fitting_kernels,
    installed_kernels,
    load_kernel,
)
from selfforcing_dfd.models.attention_choice import choose_attention

ALL = set(KERNELS)
BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "installed", "fitting"),
    [
        ((9, 0), BF16, 128, ALL, ["fa3", "fa4", "fa2"]),  # H100 and H200 alike
        ((9, 0), BF16, 128, {"fa2", "fa4"}, ["fa4", "fa2"]),
        ((9, 0), BF16, 128, set(), []),
        ((8, 0), BF16, 128, ALL, ["fa2"]),  # A100; fa4's backward pass begins with Hopper
        ((8, 9), torch.float16, 64, ALL, ["fa2"]),  # 4090
        ((10, 0), BF16, 128, ALL, ["fa4", "fa2"]),  # B200
        ((10, 0), BF16, 192, ALL, ["fa2"]),  # fa4 takes heads of up to 128
        ((12, 0), BF16, 128, ALL, ["fa4"]),  # 5090
        ((12, 0), BF16, 128, {"fa2", "fa3"}, []),
        ((7, 5), torch.float16, 64, ALL, []),  # T4
        ((9, 0), torch.float32, 128, ALL, []),
        ((9, 0), BF16, 36, ALL, []),  # heads are read 16 bytes at a time
    ],
)
def test_kernels_fit_by_the_compute_capability(capability, dtype, head_dim, installed, fitting):
    """Catches a kernel chosen by a device's name, one that crashes, and one that rounds to 8 bits.

    By name, an H200 would silently run the slow kernel.
    """
    found = fitting_kernels(capability, dtype, head_dim, installed)
    assert found == [*fitting, "sdpa", "sdpa-flash"]


def test_a_cpu_has_one_kernel():
    """Catches kernels that are measured although they are the same."""
    assert fitting_kernels(None, BF16, 128, ALL) == ["sdpa"]


@pytest.mark.parametrize(
    ("name", "capability", "dtype", "installed", "message"),
    [
        ("fa5", (9, 0), BF16, ALL, r"attention is 'fa5'; use auto, sdpa, sdpa-flash, fa3, fa4"),
        (
            "fa3",
            (8, 0),
            BF16,
            ALL,
            r"written for compute capability 9.x to 9.x, this is 8.0; or use sdpa",
        ),
        ("fa3-fp8", (10, 0), BF16, ALL, r"compute capability 9.x to 9.x, this is 10.0"),
        ("fa2", (9, 0), BF16, set(), r"flash_attn is not installed \(pip install flash-attn"),
        (
            "fa4",
            (9, 0),
            BF16,
            set(),
            r"flash_attn.cute is not installed \(pip install .\[flash\]\)",
        ),
        (
            "fa2",
            (9, 0),
            torch.float32,
            ALL,
            r"computes in float16 and bfloat16, the model is torch.float32",
        ),
        ("fa2", None, BF16, ALL, r"needs a CUDA device"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused(name, capability, dtype, installed, message):
    """Catches a forced kernel that is silently replaced by another."""
    with pytest.raises(AttentionError, match=message):
        check_name(name, capability, dtype, 128, installed)


def test_what_is_left_out_is_logged(caplog):
    """Catches hours of the slow kernel that no one knows of."""
    fitting_kernels((9, 0), BF16, 128, {"fa2"})
    assert "attention without fa3: flash_attn_interface is not installed" in caplog.text


FAKE_KERNELS = """
import types
from selfforcing_dfd.models.attention import attend
calls = []
def get_kernel(repository, *, version):
    calls.append((repository, version))
    if {fails}:
        raise OSError("no connection")
    function = lambda q, k, v: (attend(q, k, v), None)
    return types.SimpleNamespace(flash_attn_func=function)
"""


@pytest.fixture(params=[False], ids=["online"])
def kernels_package(request, tmp_path, monkeypatch):
    """A `kernels` package that hands out SDPA, or that is offline; with its calls."""
    (tmp_path / "kernels.py").write_text(FAKE_KERNELS.format(fails=request.param))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    yield lambda: importlib.import_module("kernels").calls
    sys.modules.pop("kernels", None)


@pytest.fixture
def hopper(monkeypatch):
    """Weights that say they are on an H100."""
    weight = torch.empty(1, dtype=BF16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    return SimpleNamespace(is_cuda=True, dtype=BF16, device=weight.device, requires_grad=True)


def test_a_prebuilt_kernel_is_fetched_when_it_is_chosen(kernels_package, hopper):
    """Catches a download at import or for a choice that is not taken, and its second result."""
    assert installed_kernels() == {"fa3", "fa3-fp8"}
    assert "fa3" not in fitting_kernels((8, 0), BF16, 128, installed_kernels())
    assert kernels_package() == []
    choice = choose_attention(hopper, 128)
    assert (choice.name, kernels_package()) == ("fa3", [("kernels-community/flash-attn3", 1)])
    q, k, v = (rng.normal((2, 4, 3, 8), 0, part) for part in ("q", "k", "v"))
    assert torch.equal(choice.attention(q, k, v), attend(q, k, v))


@pytest.mark.parametrize("kernels_package", [True], indirect=True, ids=["offline"])
def test_without_a_connection_auto_goes_on_and_a_forced_kernel_says_so(
    kernels_package, hopper, caplog
):
    """Catches a machine without network on which nothing streams, and a silent replacement."""
    assert choose_attention(hopper, 128).name == "sdpa"
    assert "kernels-community/flash-attn3 cannot be loaded (no connection)" in caplog.text
    with pytest.raises(AttentionError, match=r"cannot be loaded \(no connection\); use another"):
        choose_attention(hopper, 128, "fa3")


def test_an_own_build_comes_before_the_prebuilt_one(kernels_package, tmp_path):
    """Catches a download beside a kernel that was built on purpose."""
    own = "from selfforcing_dfd.models.attention import attend as flash_attn_func"
    (tmp_path / "flash_attn_interface.py").write_text(own)
    load_kernel("fa3", torch.device("cuda"))
    assert kernels_package() == []
    del sys.modules["flash_attn_interface"]


def test_a_broken_package_is_named_and_done_without(tmp_path, monkeypatch, caplog):
    """Catches a package of another torch or compiler that ends every stream with its own error."""
    broken = "raise AttributeError('module cutlass has no attribute jit')"
    (tmp_path / "flash_attn_interface.py").write_text(broken)
    monkeypatch.syspath_prepend(tmp_path)
    assert "fa3" not in installed_kernels()
    assert "flash_attn_interface is installed and cannot be imported: module cutlass" in caplog.text


def test_nothing_is_looked_for_on_a_cpu(kernels_package, monkeypatch):
    """Catches seconds of imports, or a download, where no such kernel can run."""
    monkeypatch.setattr("selfforcing_dfd.models.attention.import_kernel", pytest.fail)
    assert choose_attention(torch.empty(1), 128).name == "sdpa"


def test_sdpa_is_softmax_over_keys():
    """Catches transposed heads and tokens, and another scale."""
    q, k, v = (
        rng.normal((2, length, 3, 8), 0, name).double()
        for name, length in (("q", 4), ("k", 7), ("v", 7))
    )
    weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) / 8**0.5).softmax(-1)
    assert torch.allclose(attend(q, k, v), torch.einsum("bhqk,bkhd->bqhd", weights, v), atol=1e-12)


@pytest.mark.parametrize(
    ("name", "first"), [("sdpa", "CUDNN_ATTENTION"), ("sdpa-flash", "FLASH_ATTENTION")]
)
def test_torchs_kernels_are_asked_in_the_order_of_the_name(name, first, monkeypatch):
    """Catches two names of one kernel: torch keeps its own order unless the priority is set."""
    asked = []

    def spied(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        asked.append(_cur_sdpa_kernel_backends(with_priority=True)[0].name)
        return q

    monkeypatch.setattr("selfforcing_dfd.models.attention.attend", spied)
    load_kernel(name, torch.device("cuda"))(*(torch.empty(1, 2, 1, 8) for _ in range(3)))
    assert asked == [first]


def test_a_model_says_what_it_uses_and_uses_it():
    """Catches a setting that reaches self-attention alone, or no block at all."""
    network = tiny_network()
    text = Conditioning(rng.normal((2, 5, 12), 0, "text").double())
    assert network.set_attention("auto").name == network.attention.name == "sdpa"
    calls = []
    for block in network.wan_blocks():
        block.attend = lambda q, k, v: calls.append(k.shape[1]) or attend(q, k, v)
    network(latents("x"), 0.5, text)
    assert calls == [36, 5, 36, 5]  # six frames of six tokens, five words; twice


def test_training_in_half_precision_attends_in_float32_on_a_cpu():
    """Catches SDPA's slow backward pass in bfloat16, and another answer where it is avoided.

    The answer is that of float32 of the same inputs, rounded once; so are the gradients.
    """
    q, k, v = (rng.normal((2, 5, 2, 8), 0, name).bfloat16() for name in "qkv")
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    exact = [x.float().requires_grad_() for x in (q, k, v)]
    ours = attend(*inputs)
    assert ours.dtype == torch.bfloat16
    wanted = attend(*exact)
    assert torch.equal(ours, wanted.bfloat16())
    ours.float().sum().backward()
    wanted.sum().backward()
    for one, other in zip(inputs, exact, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad.bfloat16())
