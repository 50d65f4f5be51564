"""Distribution matching: which rows are data, their starting noise, gradients, accumulation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import CHUNK, FRAMES, LADDER, DataForcing, latents, tiny_batch
from tiny_stages import CHUNKS, NO_ROW, draw, gradients, matching_stage, rows_of, touched
from torch import Tensor

from selfforcing_dfd.context import ChunkContext, Conditioning, KVCache
from selfforcing_dfd.data.shards import Batch
from selfforcing_dfd.flow import add_noise, x0_from_flow
from selfforcing_dfd.objectives import flow_matching
from selfforcing_dfd.rollout import commit_chunk, plan_chunks


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


def test_steps_outside_the_input_range_are_dmds():
    """Catches a tie of pure noise that was to be left out, and steps that lose theirs with it.

    The pairing puts real clips into the rollout, so a row that stays tied differs from DMD there,
    too. Two updates take both steps of the ladder in turn.
    """
    tied = DataForcing(p=1.0, pairing="prefix")
    begins_with_noise = []
    for turn in (0, 1):
        dmd, everywhere, some = (
            matching_stage(each, ladder=(1.0, 0.5))
            .loss("student", tiny_batch(), draw(), turn)
            .values["loss"]
            for each in (DataForcing(), tied, replace(tied, input_range=(0.0, 0.99)))
        )
        assert not torch.equal(dmd, everywhere)
        begins_with_noise.append(torch.equal(some, dmd))
        assert torch.equal(some, dmd if begins_with_noise[-1] else everywhere)
    assert sorted(begins_with_noise) == [False, True]


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
    return stage.roll_out(batch, draw(4), rows, 0).x_exit


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
    record = stage.roll_out(batch, draw(4), rows, 0)
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
        (DataForcing(p=1.0, pairing="noised_real"), False),
        (DataForcing(p=1.0, pairing="inversion"), True),
        (DataForcing(p=0.0, pairing="prefix"), False),
        (DataForcing(p=1.0, pairing="prefix"), True),
    ],
    ids=[
        "inversion without data",
        "caption",
        "noised_real",
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


def test_exit_steps_of_student_updates_take_turns():
    """Catches a student trained more often at one step of its ladder than at another.

    24 updates decide a run here; drawn freely, one step came 9 times and another 3.
    """
    seen = []
    for update in range(8):
        part = matching_stage().loss("student", tiny_batch(), draw(seed=3), update)
        one = matching_stage().roll_out(
            tiny_batch(), draw(seed=3), NO_ROW, draw(seed=3).in_turn("exit", len(LADDER), update)
        )
        assert part.generated is not None
        torch.testing.assert_close(part.generated, one.x0)
        seen.append(float(one.sigma_exit[0, 0]))
    assert sorted(seen[:4]) == sorted(seen[4:]) == sorted(LADDER)


def test_fake_turns_roll_out_to_every_step():
    """Catches a fake score that knows the samples of one exit step only."""
    stage = matching_stage()
    exits = {draw(first=2 * n, update=2 * n).choice("exit", len(stage.ladder)) for n in range(24)}
    assert exits == set(range(len(LADDER)))


def test_logged_values_are_one_a_sample():
    """Catches batch means in logs that need a value for each sample, and a sum that disagrees.

    Logs are split by branch and by sigma.
    """
    part = matching_stage(DataForcing(p=1.0)).loss("student", tiny_batch(3), draw(3), 0)
    assert {name: tuple(value.shape) for name, value in part.values.items()} == dict.fromkeys(
        ("loss", "discrepancy", "normaliser", "gap", "dfd", "dmd", "sigma"), (3,)
    )
    torch.testing.assert_close(part.values["loss"].mean(), part.loss.detach())
    assert ((part.values["sigma"] >= 0.02) & (part.values["sigma"] <= 0.98)).all()


def test_window_and_sink_reach_the_rollout():
    """Catches a student trained with the whole past and streamed with a window of it."""
    batch = tiny_batch()
    narrow = matching_stage(window=2, sink=2).roll_out(batch, draw(), NO_ROW, 1)
    wide = matching_stage().roll_out(batch, draw(), NO_ROW, 1)
    assert not torch.equal(narrow.x0, wide.x0)
    assert [len(context.chunks) for context in narrow.contexts] == [0, 1, 1]


def test_rows_with_a_real_past_and_no_anchor_leave_no_gradient():
    """Catches a loss on clips of pieces that do not join, which the fake score has never seen."""
    batch = tiny_batch(with_noise=True)
    never = DataForcing(p=1.0, pairing="prefix", sigma_range=(0.985, 1.0))
    stage = matching_stage(never)
    part = stage.loss("student", batch, draw(), 0)
    part.loss.backward()
    assert part.loss == 0
    assert float(gradients(stage.trained["student"]).abs().max()) == 0
    assert part.values["dfd"].sum() == part.values["dmd"].sum() == 0
    assert float(part.values["loss"].min()) > 0  # it is logged, and not trained


def test_a_guided_fake_score_learns_without_caption_too():
    """Catches guidance of a fake score whose answer to no caption was never trained."""
    batch = tiny_batch()
    empty = replace(batch, text=torch.zeros_like(batch.text))
    always = matching_stage(fake_text_dropout=1.0)
    rolled = always.roll_out(batch, draw(), NO_ROW, draw().choice("exit", len(LADDER))).x0
    noise, sigma = always.draw_score(draw(), rolled)
    expected = flow_matching(
        always.trained["fake"], rolled, noise, sigma, Conditioning(empty.text)
    ).mean()
    torch.testing.assert_close(always.loss("fake", batch, draw(), 0).loss, expected)
    kept = matching_stage().loss("fake", batch, draw(), 0).loss
    assert not torch.isclose(kept, expected)


def test_a_student_that_keeps_its_noise_is_trained_on_such_rollouts():
    """Catches DMD on clips that the student would not make."""
    batch = tiny_batch()
    kept = matching_stage(keeps_noise=True)
    record = kept.roll_out(batch, draw(), NO_ROW, 1)
    noise = draw().normal("rollout", (1, *batch.latents.shape[1:]), batch.latents)[:, 0]
    student, text = kept.trained["student"], Conditioning(batch.text)
    first = CHUNKS[0].of(noise)
    flow = student(first, LADDER[0], text, ChunkContext()).flow
    torch.testing.assert_close(CHUNKS[0].of(record.x_exit), first + (LADDER[1] - LADDER[0]) * flow)


def test_a_student_of_noised_clips_sees_them_in_every_row():
    """Catches rows of DMD whose trained step starts from the student's own samples.

    At the first step there is nothing but noise.
    """
    batch, no_row = tiny_batch(4), NO_ROW.repeat(2)
    stage = matching_stage(real_input=True)
    noise = stage.rollout_noise(batch, draw(4))
    for step, sigma in enumerate(LADDER):
        record = stage.roll_out(batch, draw(4), no_row, step)
        level = torch.full((4,), sigma, dtype=torch.float64)
        expected = add_noise(batch.latents, noise[step], level) if step else noise[0]
        torch.testing.assert_close(record.x_exit, expected)
    draws = (draw(4, seed=seed) for seed in range(9))
    later = next(each for each in draws if each.choice("exit", len(LADDER)))
    others = replace(batch, latents=latents("other clips", batch=4))
    first, second = (stage.loss("fake", clips, later, 0).loss for clips in (batch, others))
    assert first != second


def test_a_student_of_whole_clips_is_one_chunk():
    """Catches a bidirectional student that cannot be trained, or sees its clip in parts.

    Its trained step is the network's answer for the whole clip, as a teacher gives it.
    """
    whole = matching_stage(chunks=plan_chunks(FRAMES, FRAMES))
    batch, student = tiny_batch(), whole.trained["student"]
    record = whole.roll_out(batch, draw(), NO_ROW, 0)
    flow = student(record.x_exit, LADDER[0], Conditioning(batch.text)).flow
    torch.testing.assert_close(record.x0, x0_from_flow(record.x_exit, flow, LADDER[0]))
    part = whole.loss("student", batch, draw(), 0)
    part.loss.backward()
    assert gradients(student).abs().max() > 0
