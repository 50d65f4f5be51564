"""What each stage optimises: data rows, starting noise, gradients, accumulation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import CHUNK, FRAMES, LADDER, SHAPE, DataForcing, latents, tiny_batch, tiny_network
from torch import Tensor, nn

from selfforcing_dfd.context import Conditioning, KVCache
from selfforcing_dfd.data.shards import Batch
from selfforcing_dfd.forcing import tied_rows
from selfforcing_dfd.ode import teacher_forced_contexts
from selfforcing_dfd.rng import Draw
from selfforcing_dfd.rollout import commit_chunk, plan_chunks
from selfforcing_dfd.stages.base import drop_text
from selfforcing_dfd.stages.init import InitStage
from selfforcing_dfd.stages.matching import MatchingStage
from selfforcing_dfd.stages.teacher import TeacherStage

CHUNKS = plan_chunks(FRAMES, CHUNK)
NOBODY = torch.zeros(2, dtype=torch.bool)  # no row is tied


def draw(count: int = 2, first: int = 0, update: int = 0, seed: int = 0) -> Draw:
    return Draw(seed, update, first, tuple(range(first, first + count)))


def matching_stage(forcing: DataForcing | None = None, **changes: Any) -> MatchingStage:
    """Three different networks, none frozen, so that misplaced gradient shows."""
    settings: dict[str, Any] = {
        "trained": {"student": tiny_network(0), "fake": tiny_network(2)},
        "teacher": tiny_network(1),
        "chunks": CHUNKS,
        "ladder": LADDER,
        "guidance": 4.0,
        "shift": 5.0,
        "sigma_min": 0.02,
        "sigma_max": 0.98,
        "min_normaliser": 1e-3,
        "fake_per_student": 5,
        **(forcing or DataForcing()).settings(),
    }
    return MatchingStage(**(settings | changes))


def rows_of(batch: Batch, start: int, count: int) -> Batch:
    part = slice(start, start + count)
    noise = batch.noise[part] if batch.noise is not None else None
    return Batch(
        batch.latents[part], batch.text[part], batch.captions[part], batch.keys[part], noise
    )


def gradients(network: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


def touched(network: nn.Module) -> list[str]:
    return [name for name, p in network.named_parameters() if p.grad is not None]


@pytest.mark.parametrize("granularity", ["update", "micro", "sample"])
def test_coin_is_shared_by_what_its_granularity_says(granularity):
    """Catches a coin that is shared by too many or too few samples.

    With a coin for each sample, DFD at p = .5 never has an update of one kind only. 64 updates of 4
    micro-batches of 4: at p = .5 a wrong grouping passes by chance once in 2^48.
    """
    forcing = DataForcing(p=0.5, granularity=granularity)
    coins = torch.stack(
        [
            torch.stack(
                [
                    forcing.rows(draw(4, 16 * update + 4 * micro, 16 * update), 0)
                    for micro in range(4)
                ]
            )
            for update in range(64)
        ]
    )  # [update, micro-batch, sample]
    equal_in_micro = (coins == coins[:, :, :1]).all()
    equal_in_update = (coins == coins[:, :1, :1]).all()
    assert bool(equal_in_micro) == (granularity != "sample")
    assert bool(equal_in_update) == (granularity == "update")
    assert coins.any()
    assert not coins.all()


@pytest.mark.parametrize("granularity", ["update", "micro", "sample"])
def test_probability_zero_is_never_and_one_is_always(granularity):
    """Catches a coin compared the wrong way round: p = 0 must be DMD, p = 1 the data branch."""
    for p, expected in ((0.0, False), (1.0, True)):
        forcing = DataForcing(p=p, granularity=granularity)
        assert all(forcing.rows(draw(4, 4 * n, 4 * n), 0).eq(expected).all() for n in range(50))


def test_coin_shows_data_with_probability_p():
    """Catches 1 - p for p. 2000 independent coins at .3: five standard errors are .051."""
    rows = DataForcing(p=0.3, granularity="sample").rows(draw(2000), 0)
    assert rows.double().mean() == pytest.approx(0.3, abs=0.051)


def test_probability_ramps_in_student_updates():
    """Catches a ramp that ends early, overshoots, or divides by zero when there is none."""
    coin = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]
    ramp = DataForcing(p=0.5, p_start=0.1, ramp_updates=4).settings()["forcing"]
    shares = [tied_rows(coin, ramp, n).double().mean().item() for n in (0, 1, 2, 4, 400)]
    assert shares == pytest.approx([0.1, 0.2, 0.3, 0.5, 0.5], abs=2e-3)
    no_ramp = DataForcing(p=0.5, p_start=0.1).settings()["forcing"]
    assert tied_rows(coin, no_ramp, 0).sum() == 500


def test_draws_depend_on_positions_only():
    """Catches noise tied to the micro-batch, the rank or the order of calls.

    Another batch size must draw the same.
    """
    whole = draw(4, first=8)
    part = Draw(0, update_start=999, micro_start=7, positions=(10, 9))
    like = torch.zeros((), dtype=torch.float64)
    assert torch.equal(
        part.normal("score", SHAPE, like), whole.normal("score", SHAPE, like)[[2, 1]]
    )
    assert torch.equal(part.uniform("sigma"), whole.uniform("sigma")[[2, 1]])
    assert not torch.equal(
        whole.normal("score", SHAPE, like)[0], whole.normal("score", SHAPE, like)[1]
    )


def test_choices_are_shared_by_an_update_and_differ_between_updates():
    """Catches an exit step drawn by each rank or micro-batch.

    Ranks would walk different ladders and wait for each other.
    """
    choices = [
        draw(2, first=16 * update + 2, update=16 * update).choice("exit", 4) for update in range(40)
    ]
    again = [
        draw(4, first=16 * update + 8, update=16 * update).choice("exit", 4) for update in range(40)
    ]
    assert choices == again
    assert set(choices) == {0, 1, 2, 3}


@pytest.mark.parametrize("turn", ["student", "fake"])
@pytest.mark.parametrize("granularity", ["update", "sample"])
def test_accumulating_micro_batches_equals_one_batch(turn, granularity):
    """Catches draws or a mean that depend on how an update is cut into micro-batches.

    float64, 1e-12 relative.
    """
    forcing = DataForcing(p=0.5, granularity=granularity, pairing="inversion")
    batch, results = tiny_batch(4, with_noise=True), []
    for micro in (4, 2):
        stage = matching_stage(forcing)
        for first in range(0, 4, micro):
            part = stage.loss(turn, rows_of(batch, first, micro), draw(micro, first, 0, seed=1), 0)
            (part.loss * micro / 4).backward()
        results.append(gradients(stage.trained[turn]))
    whole, parts = results
    assert (parts - whole).norm() < 1e-12 * whole.norm()


@pytest.mark.parametrize("turn", ["student", "fake"])
def test_a_turn_touches_only_the_network_that_it_trains(turn):
    """Catches gradient in the teacher or the other network.

    It would be applied with the next update.
    """
    stage = matching_stage(DataForcing(p=1.0))
    stage.loss(turn, tiny_batch(), draw(), 0).loss.backward()
    for name, network in (*stage.trained.items(), ("teacher", stage.teacher)):
        everything = [parameter for parameter, _ in network.named_parameters()]
        assert touched(network) == (everything if name == turn else [])


def test_fake_score_never_sees_data():
    """Catches a fake score that learns the real clips.

    It must follow the student's own distribution, for every p.
    """
    batch = tiny_batch(with_noise=True)
    others = replace(batch, latents=latents("other clips"), noise=latents("other clip noise"))
    dmd = matching_stage(DataForcing(p=0.0)).loss("fake", batch, draw(), 0).loss
    dfd = (
        matching_stage(DataForcing(p=1.0, pairing="inversion")).loss("fake", others, draw(), 0).loss
    )
    assert torch.equal(dmd, dfd)


def dmd_and_dfd(batch: Batch, forcing: DataForcing) -> list[tuple[Tensor, Tensor]]:
    """Loss and student gradient without and with data forcing."""
    results = []
    for each in (DataForcing(), forcing):
        stage = matching_stage(each)
        loss = stage.loss("student", batch, draw(), 0).loss
        loss.backward()
        results.append((loss.detach(), gradients(stage.trained["student"])))
    return results


def test_data_equal_to_the_own_samples_is_dmd_bitwise():
    """Catches anything that the data branch changes besides the anchor."""
    batch = tiny_batch()
    generated = matching_stage().loss("student", batch, draw(), 0).generated
    assert generated is not None
    (dmd_loss, dmd_grad), (dfd_loss, dfd_grad) = dmd_and_dfd(
        replace(batch, latents=generated), DataForcing(p=1.0)
    )
    assert torch.equal(dmd_loss, dfd_loss)
    assert torch.equal(dmd_grad, dfd_grad)


def test_data_changes_the_students_gradient():
    """Catches an anchor that never arrives: every test of equality with DMD would pass."""
    (_, dmd_grad), (_, dfd_grad) = dmd_and_dfd(tiny_batch(), DataForcing(p=1.0))
    assert (dmd_grad - dfd_grad).norm() > 0.05 * dmd_grad.norm()


def test_outside_its_sigma_range_data_forcing_is_dmd():
    """Catches rows outside the sigma range that are dropped or anchored."""
    (dmd_loss, dmd_grad), (dfd_loss, dfd_grad) = dmd_and_dfd(
        tiny_batch(), DataForcing(p=1.0, sigma_range=(0.985, 1.0))
    )
    assert torch.equal(dmd_loss, dfd_loss)
    assert torch.equal(dmd_grad, dfd_grad)


def test_sigma_range_falls_back_row_by_row():
    """Catches a sigma range applied to the whole batch, and logs of the wrong rows."""
    batch, everything = tiny_batch(4), matching_stage(DataForcing(p=1.0))
    all_rows = everything.loss("student", batch, draw(4), 0).values
    none = matching_stage().loss("student", batch, draw(4), 0).values
    middle = float(all_rows["sigma"].median())
    some = (
        matching_stage(DataForcing(p=1.0, sigma_range=(middle, 1.0)))
        .loss("student", batch, draw(4), 0)
        .values
    )
    high = some["sigma"] >= middle
    assert some["dfd"].bool().equal(high)
    assert 0 < high.sum() < 4
    assert torch.equal(some["loss"], torch.where(high, all_rows["loss"], none["loss"]))


def starts(forcing: DataForcing, batch: Batch) -> Tensor:
    """The noise that each clip starts from: with one step, this is the input of the exit step."""
    stage = matching_stage(forcing, ladder=(1.0,))
    rows = forcing.rows(draw(4), 0)
    return stage.roll_out(batch, draw(4), rows).x_exit


def test_inversion_starts_from_the_stored_noise_in_data_rows_only():
    """Catches DMD rows started from stored noise, and data rows started from a fresh draw.

    Noise and anchor must belong together exactly where the anchor is used.
    """
    batch = tiny_batch(4, with_noise=True)
    assert batch.noise is not None
    forcing = DataForcing(p=0.5, granularity="sample", pairing="inversion")
    rows = forcing.rows(draw(4), 0)
    assert 0 < rows.sum() < 4
    own = starts(DataForcing(), batch)
    assert torch.equal(
        starts(forcing, batch), torch.where(rows[:, None, None, None, None], batch.noise, own)
    )
    assert not torch.isclose(own, batch.noise).any(dim=(1, 2, 3, 4)).all()


def test_prefix_ties_the_first_chunk_by_noise_and_later_ones_by_their_past():
    """Catches later chunks tied by noise, and rows whose context is of the wrong clip.

    Data rows see the real past, other rows their own.
    """
    batch = tiny_batch(4, with_noise=True)
    assert batch.noise is not None
    forcing = DataForcing(p=0.5, granularity="sample", pairing="prefix")
    rows = forcing.rows(draw(4), 0)
    mask = rows[:, None, None, None, None]
    own, tied = starts(DataForcing(), batch), starts(forcing, batch)
    assert torch.equal(tied[:, :CHUNK], torch.where(mask, batch.noise, own)[:, :CHUNK])
    assert torch.equal(tied[:, CHUNK:], own[:, CHUNK:])

    stage = matching_stage(forcing)
    record = stage.roll_out(batch, draw(4), rows)
    past = torch.where(mask, batch.latents, record.x0)[:, :CHUNK]
    cache = KVCache()
    commit_chunk(stage.trained["student"], past, Conditioning(batch.text), cache)
    for seen, wanted in zip(
        record.contexts[1].chunks[0].layers, cache.read(CHUNK).chunks[0].layers, strict=True
    ):
        assert torch.equal(seen[0], wanted[0])
        assert torch.equal(seen[1], wanted[1])


@pytest.mark.parametrize(
    ("forcing", "uses_stored_noise"),
    [
        (DataForcing(p=0.0, pairing="inversion"), False),
        (DataForcing(p=1.0, pairing="caption"), False),
        (DataForcing(p=1.0, pairing="assignment"), False),
        (DataForcing(p=1.0, pairing="inversion"), True),
        (DataForcing(p=0.0, pairing="prefix"), False),
        (DataForcing(p=1.0, pairing="prefix"), True),
    ],
    ids=[
        "inversion without data",
        "caption",
        "assignment",
        "inversion",
        "prefix without data",
        "prefix",
    ],
)
def test_stored_noise_matters_to_the_student_only_under_inversion(forcing, uses_stored_noise):
    """Catches stored noise in the paper's pairing, where noise and anchor are independent."""
    stage = matching_stage(forcing)
    batch = tiny_batch(with_noise=True)
    other = replace(batch, noise=latents("other clip noise"))
    losses = [stage.loss("student", each, draw(), 0).loss for each in (batch, other)]
    assert torch.equal(*losses) is not uses_stored_noise


def test_exit_steps_cover_the_ladder():
    """Catches a student that is only ever trained at one step of its ladder."""
    stage = matching_stage()
    exits = {
        stage.roll_out(tiny_batch(), draw(first=2 * n, update=2 * n), NOBODY).sigma_exit
        for n in range(24)
    }
    assert exits == {(sigma,) * len(CHUNKS) for sigma in LADDER}


def test_logged_values_are_one_a_sample():
    """Catches batch means in logs that need a value for each sample, and a sum that disagrees.

    Logs are split by branch and by sigma.
    """
    part = matching_stage(DataForcing(p=1.0)).loss("student", tiny_batch(3), draw(3), 0)
    assert {name: tuple(value.shape) for name, value in part.values.items()} == dict.fromkeys(
        ("loss", "discrepancy", "normaliser", "gap", "dfd", "sigma"), (3,)
    )
    torch.testing.assert_close(part.values["loss"].mean(), part.loss.detach())
    assert ((part.values["sigma"] >= 0.02) & (part.values["sigma"] <= 0.98)).all()


def test_window_and_sink_reach_the_rollout():
    """Catches a student trained with the whole past and streamed with a window of it."""
    batch = tiny_batch()
    narrow = matching_stage(window=2, sink=2).roll_out(batch, draw(), NOBODY)
    wide = matching_stage().roll_out(batch, draw(), NOBODY)
    assert not torch.equal(narrow.x0, wide.x0)
    assert [len(context.chunks) for context in narrow.contexts] == [0, 1, 1]


def single_stages() -> dict[str, TeacherStage | InitStage]:
    return {
        "teacher": TeacherStage({"student": tiny_network()}, shift=3.0, text_dropout=0.1),
        "init": InitStage({"student": tiny_network()}, CHUNKS, shift=3.0, text_dropout=0.1),
    }


@pytest.mark.parametrize("name", ["teacher", "init"])
def test_data_stages_reach_every_parameter(name):
    """Catches a stage that trains half a network.

    Every parameter gets a finite gradient that is not zero.
    """
    stage = single_stages()[name]
    part = stage.loss("student", tiny_batch(), draw(), 0)
    part.loss.backward()
    assert part.loss.isfinite()
    for parameter_name, p in stage.trained["student"].named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), parameter_name


def test_init_stage_is_teacher_forcing():
    """Catches context of the student's own or of noisy clips, and stored noise in later chunks.

    With stored noise there, the student would learn to follow its noise and not its context.
    Compared with a loop over the chunks of real clips.
    """
    stage, batch = (
        InitStage({"student": tiny_network()}, CHUNKS, 3.0, 0.0),
        tiny_batch(with_noise=True),
    )
    assert batch.noise is not None
    noises = draw().normal("noise", batch.latents.shape[1:], batch.latents)
    noises[:, : CHUNKS[0].frames] = batch.noise[:, : CHUNKS[0].frames]
    network, text, losses = stage.trained["student"], Conditioning(batch.text), []
    level = draw().uniform("sigma", (3,))
    sigma = 3 * level / (1 + 2 * level)
    contexts = teacher_forced_contexts(network, batch.latents, text, KVCache(), CHUNKS)
    for index, (chunk, context) in enumerate(zip(CHUNKS, contexts, strict=True)):
        x0, noise, s = (
            chunk.of(batch.latents),
            chunk.of(noises),
            sigma[:, index, None, None, None, None],
        )
        flow = network((1 - s) * x0 + s * noise, sigma[:, index], text, context).flow
        losses.append((flow - (noise - x0)).square().mean())
    assert [context.next_frame for context in contexts] == [0, 2, 4]
    assert [len(context.chunks) for context in contexts] == [0, 1, 2]
    loss = stage.loss("student", batch, draw(), 0).loss
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-12, atol=0)


def test_init_stage_uses_the_stored_noise_where_there_is_some():
    """Catches a regression from independent noise.

    The few-step student would learn the mean of all clips.
    """
    stage, batch = (
        InitStage({"student": tiny_network()}, CHUNKS, 3.0, 0.0),
        tiny_batch(with_noise=True),
    )
    with_noise, other, without = (
        stage.loss("student", replace(batch, noise=noise), draw(), 0).loss
        for noise in (batch.noise, latents("other clip noise"), None)
    )
    assert len({float(loss.detach()) for loss in (with_noise, other, without)}) == 3


def test_teacher_stage_shifts_and_clamps_nothing_else():
    """Catches sigmas that stop short of 0 or 1.

    The sampler starts at exactly 1 and inversion at 0.
    """
    level = draw(64).uniform("sigma")
    stage = TeacherStage({"student": tiny_network()}, shift=3.0, text_dropout=0.0)
    losses = stage.loss("student", tiny_batch(64, frames=1), draw(64), 0).values["flow_loss"]
    network, batch = stage.trained["student"], tiny_batch(64, frames=1)
    noise = draw(64).normal("noise", batch.latents.shape[1:], batch.latents)
    sigma = 3 * level / (1 + 2 * level)
    s = sigma[:, None, None, None, None]
    flow = network((1 - s) * batch.latents + s * noise, sigma, Conditioning(batch.text)).flow
    torch.testing.assert_close(
        losses, (flow - (noise - batch.latents)).square().mean((1, 2, 3, 4)).detach()
    )


def test_text_dropout_empties_whole_captions():
    """Catches dropout of single words.

    Guidance needs an answer to a text that is all zero. 1000 samples at .25: five standard errors
    are .069.
    """
    batch = tiny_batch(2)
    many = replace(batch, text=batch.text[:1].expand(1000, -1, -1))
    text = drop_text(many, draw(1000), 0.25).text
    empty = (text == 0).all(dim=(1, 2))
    assert torch.equal(text[~empty], many.text[~empty])
    assert empty.double().mean() == pytest.approx(0.25, abs=0.069)
    assert torch.equal(drop_text(many, draw(1000), 0.0).text, many.text)
    assert not drop_text(many, draw(1000), 1.0).text.any()
