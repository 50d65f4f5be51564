"""Sigma algebra: the straight path, the ladder, the shift, and the reference's tables."""

from __future__ import annotations

import pytest
import torch
from golden_weights import golden
from tiny_models import latents

from selfforcing_dfd.flow import add_noise, expand_sigma, few_step_ladder, shift_sigma, x0_from_flow

F64 = {"rtol": 0, "atol": 1e-14}  # a handful of float64 roundings of numbers of order one
UNIT = torch.linspace(0, 1, 101, dtype=torch.float64)


@pytest.mark.parametrize("sigma", [0.0, 1e-3, 0.5, 0.625, 1.0])
def test_flow_leads_back_to_x0(sigma):
    """Catches a wrong sign or swapped ends of the path.

    Such a model still trains, on something else.
    """
    x0, noise = latents("x0"), latents("noise")
    torch.testing.assert_close(
        x0_from_flow(add_noise(x0, noise, sigma), noise - x0, sigma), x0, **F64
    )


def test_x0_and_flow_are_inverse_at_any_noise_level():
    """Catches conversions that only agree on a table's sigmas.

    x0 -> flow -> x0 for arbitrary flows and sigmas.
    """
    x_t, flow = latents("x_t"), latents("flow")
    sigma = torch.tensor([0.37, 0.011], dtype=torch.float64)
    x0 = x0_from_flow(x_t, flow, sigma)
    # rounding / .011
    torch.testing.assert_close((x_t - x0) / expand_sigma(sigma, x_t), flow, rtol=0, atol=1e-12)


def test_path_starts_at_data_and_ends_at_noise():
    """Catches a sigma that never reaches its ends.

    In lookup tables sigma(0) is .005.
    """
    x0, noise = latents("x0"), latents("noise")
    assert torch.equal(add_noise(x0, noise, 0.0), x0)
    assert torch.equal(add_noise(x0, noise, 1.0), noise)


def test_sigma_may_be_a_number_one_a_sample_or_one_a_latent_frame():
    """Catches a broadcast along the wrong axis.

    When B = F, reading [B] as frames mixes up samples without any error.
    """
    x0, noise = latents("x0", frames=2), latents("noise", frames=2)
    sigma = torch.tensor([0.25, 0.75], dtype=torch.float64)
    by_sample = add_noise(x0, noise, sigma)
    for sample in range(2):
        assert torch.equal(
            by_sample[sample], add_noise(x0[sample], noise[sample], float(sigma[sample]))
        )
    by_frame = add_noise(x0, noise, sigma.expand(2, 2))
    for frame in range(2):
        assert torch.equal(by_frame[:, frame], add_noise(x0, noise, float(sigma[frame]))[:, frame])


def test_ladder_is_self_forcings():
    """Catches any drift of the four sigmas that every distilled student was trained at."""
    assert few_step_ladder((1000, 750, 500, 250), 5.0) == pytest.approx(
        (1, 15 / 16, 5 / 6, 5 / 8), rel=1e-15
    )


@pytest.mark.parametrize("shift", [5, 8])
def test_ladder_and_shift_equal_the_references_tables(shift):
    """Catches a shift applied to the wrong end of time.

    Tables are float32: half an ulp of 1000 is 3e-5.
    """
    tables = golden("schedule")
    u = 1 - torch.arange(1000, dtype=torch.float64) / 1000
    torch.testing.assert_close(
        shift_sigma(u, shift).float(), tables[f"shift{shift}/sigmas"], rtol=0, atol=1e-6
    )
    for steps in ((1000, 750, 500, 250), (1000, 500)):
        warped = tables[f"shift{shift}/warped_" + "_".join(map(str, steps))].double()
        ladder = torch.tensor(few_step_ladder(steps, shift), dtype=torch.float64)
        torch.testing.assert_close(1000 * ladder, warped, rtol=0, atol=4e-5)


def test_conversions_equal_the_references_examples():
    """Catches a swapped argument.

    The reference's examples with sigma = t / 1000, float32 on both sides.
    """
    tables = golden("schedule")
    sigma, x0, noise, flow = (tables[f"example/{name}"] for name in ("t", "x0", "eps", "flow"))
    sigma = sigma / 1000
    torch.testing.assert_close(
        add_noise(x0, noise, sigma), tables["example/exact/x_t"], rtol=0, atol=1e-6
    )
    torch.testing.assert_close(
        x0_from_flow(x0, flow, sigma), tables["example/exact/x0_from_flow"], rtol=0, atol=1e-6
    )


def test_shift_one_changes_nothing():
    """Catches a shift formula with its constant off by one."""
    torch.testing.assert_close(shift_sigma(UNIT, 1.0), UNIT, **F64)


def test_shifts_compose_and_keep_the_ends():
    """Catches every other formula through (0, 0), (1, 1): shifts by a and by b are one by a b."""
    torch.testing.assert_close(
        shift_sigma(shift_sigma(UNIT, 3.0), 5.0), shift_sigma(UNIT, 15.0), **F64
    )
    assert shift_sigma(UNIT, 5.0)[[0, -1]].tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    "timesteps",
    [(), (750, 500), (1000, 1000, 500), (1000, 500, 750), (1000, 500, 0), (1000, -250)],
    ids=["empty", "no pure noise", "repeated", "rising", "reaches zero", "negative"],
)
def test_bad_ladder_is_refused_with_a_remedy(timesteps):
    """Catches a ladder that starts below noise or repeats a step.

    It would run, and train the student at the wrong sigmas.
    """
    with pytest.raises(ValueError, match=r"must start at 1000, fall, and stay above 0") as error:
        few_step_ladder(timesteps, 5.0)
    assert str(timesteps) in str(error.value)
