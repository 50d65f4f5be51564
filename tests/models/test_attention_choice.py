"""The choice among kernels that fit: by a measurement, with answers that are checked."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch
from kernel_packages import install

from selfforcing_dfd.models import attention_choice
from selfforcing_dfd.models.attention import AttentionError, attend, load_kernel
from selfforcing_dfd.models.attention_choice import (
    Choice,
    KernelAttention,
    Trial,
    choose_attention,
    fastest,
    measured,
)

TRIAL = Trial(queries=4, keys=12, heads=2, head_dim=8)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """An H100 that computes on the CPU, with all kernels, of which none was measured yet."""
    install(monkeypatch, "fa2", "fa3", "fa4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    measured.cache_clear()
    yield
    measured.cache_clear()


@pytest.fixture
def weight() -> SimpleNamespace:
    """Of a network on that H100."""
    device = torch.device("cpu")
    return SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device=device, requires_grad=False)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The kernels that were called, each with its own pace: fa4 is fast, fa2 fails, fa3 is off."""
    called = []
    pace_s = {"fa4": 0.0, "sdpa": 0.006, "sdpa-flash": 0.003}

    def load(name, device):
        def run(q, k, v):
            called.append(name)
            if name == "fa2":
                raise RuntimeError("no kernel image is available")
            time.sleep(pace_s.get(name, 0.0))
            return attend(q, k, v) * (1.1 if name == "fa3" else 1.0)

        return run

    monkeypatch.setattr(attention_choice, "load_kernel", load)
    return called


def test_the_fastest_right_kernel_is_taken(weight, calls, caplog):
    """Catches a choice from a list, a kernel that is fast because it is wrong, and one that fails.

    Each kernel is asked on the trial, and its answer is compared with SDPA's.
    """
    choice = choose_attention(weight, 8, "auto", TRIAL)
    assert choice.name == "fa4"
    assert set(choice.timings_ms) == {"fa4", "sdpa", "sdpa-flash"}
    assert str(choice).startswith("fa4 (measured: fa4 ")
    assert "attention fa3 is left out: attention fa3 is off by 0.1 of SDPA's answer" in caplog.text
    assert "attention fa2 is left out: no kernel image is available" in caplog.text
    assert "attention by fa4" in caplog.text


def test_a_device_that_was_idle_charges_no_kernel_for_it(weight, monkeypatch):
    """Catches kernels measured one after the other, of which the first waits for the GPU's clock.

    Here all are equally fast, and the first 20 calls take twice as long.
    """
    called = []

    def load(name, device):
        def run(q, k, v):
            called.append(name)
            time.sleep(0.004 if len(called) <= 20 else 0.002)
            return attend(q, k, v)

        return run

    monkeypatch.setattr(attention_choice, "load_kernel", load)
    monkeypatch.setattr(attention_choice, "installed_kernels", lambda: {"fa3", "fa4"})
    timings = choose_attention(weight, 8, "auto", TRIAL).timings_ms
    assert max(timings.values()) < 1.5 * min(timings.values())


def test_a_measurement_is_made_once(weight, calls):
    """Catches a second student of a page that measures again, seconds before its first frame."""
    choose_attention(weight, 8, "auto", TRIAL)
    done = len(calls)
    choose_attention(weight, 8, "auto", TRIAL)
    assert len(calls) == done


def test_training_measures_nothing(weight, calls):
    """Catches processes, or a resumed run, that take another kernel because a clock said so."""
    assert choose_attention(weight, 8).name == "fa3"
    assert calls == []


def test_a_kernel_of_torch_imports_no_other(weight, monkeypatch):
    """Catches ten seconds of every start in which FlashAttention 4 is imported for nothing."""
    monkeypatch.setattr(attention_choice, "installed_kernels", lambda: pytest.fail("imported"))
    assert choose_attention(weight, 8, "sdpa", TRIAL).name == "sdpa"


def test_kernels_of_about_one_speed_do_not_take_turns():
    """Catches another kernel, and so another video, at each start of the same stream."""
    assert fastest({"fa3": 1.04, "fa4": 1.0, "sdpa": 2.0}) == "fa3"
    assert fastest({"fa3": 1.06, "fa4": 1.0, "sdpa": 2.0}) == "fa4"


def test_eight_bits_are_for_those_who_ask_and_do_not_train(weight):
    """Catches a kernel without a backward pass in training, and 8 bits that nobody asked for."""
    assert choose_attention(weight, 8, "fa3-fp8").name == "fa3-fp8"
    weight.requires_grad = True
    with pytest.raises(AttentionError, match="has no backward pass; train with another"):
        choose_attention(weight, 8, "fa3-fp8")


def test_without_a_measurement_a_choice_is_its_name():
    """Catches an empty pair of brackets in the line that a stream begins with."""
    assert str(Choice(KernelAttention("fa3", load_kernel("fa3", torch.device("cpu"))))) == "fa3"
