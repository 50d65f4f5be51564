"""Training students of fewer passes: exits, past and cost of a rollout, and what is refused."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from tiny_models import (
    CHUNK,
    FRAMES,
    LADDER,
    DataForcing,
    conditioning,
    ladder_noise,
    latents,
    tiny_batch,
    tiny_network,
)
from tiny_stages import NO_ROW, draw, matching_stage
from torch import Tensor

from selfforcing_dfd.config import ConfigError
from selfforcing_dfd.context import ChunkContext, KVCache
from selfforcing_dfd.flow import add_noise
from selfforcing_dfd.models.identity import recipe_of_rollout
from selfforcing_dfd.rollout import RealRows, plan_chunks, replay, rollout
from selfforcing_dfd.stages import load_config
from selfforcing_dfd.stages.own_past import real_past, rollout_passes
from selfforcing_dfd.training.estimate import Clip

TWO = (1.0, 0.8)
CHUNKS = plan_chunks(FRAMES, CHUNK)


def roll(**how: Any) -> Any:
    noise = ladder_noise()
    network = tiny_network()
    return rollout(network, noise, conditioning(), KVCache(), LADDER, CHUNKS, commits=False, **how)


@pytest.mark.parametrize("exits", [(3, 3, 3), (0, 0, 0), (1, 2, 3)], ids=str)
def test_context_has_the_last_steps_noise_whatever_the_exit(exits):
    """Catches a context of the exit step, which a stream never sees, and one that is clean.

    By hand: after an earlier exit, x0 with the last step's own draw at the last step's level.
    """
    network, text, noise = tiny_network(), conditioning(), ladder_noise()
    past, clips = [], []
    for chunk, step in zip(CHUNKS, exits, strict=True):
        draws = chunk.of(noise, 2)
        context = ChunkContext(tuple(past), chunk.start)
        x = draws[0]
        for i in range(step):
            x0 = x - LADDER[i] * network(x, LADDER[i], text, context).flow
            x = add_noise(x0, draws[i + 1], LADDER[i + 1])
        x0 = x - LADDER[step] * network(x, LADDER[step], text, context).flow
        last = x if step == 3 else add_noise(x0, draws[3], LADDER[3])
        past.append(network(last, LADDER[3], text, context).kv)
        clips.append(x0)
    record = roll(exit_steps=exits)
    torch.testing.assert_close(record.x0, torch.cat(clips, 1), atol=1e-12, rtol=0)
    torch.testing.assert_close(replay(network, record, text), record.x0, atol=1e-12, rtol=0)
    for index, context in enumerate(record.contexts):
        for kept, wanted in zip(context.chunks, past[:index], strict=True):
            torch.testing.assert_close(kept.layers[1][0], wanted.layers[1][0], atol=1e-12, rtol=0)


def test_a_real_past_is_noised_in_its_rows_alone():
    """Catches a real clip that is seen clean, and own rows that see it.

    The rollout of own rows is noised again as well, from its finished chunk: the rows of a batch
    are made in one pass.
    """
    real = RealRows(latents("real"), torch.tensor([True, False]))
    own, mixed = roll(), roll(real_past=real)
    assert (mixed.x0[0, CHUNK:] - own.x0[0, CHUNK:]).abs().max() > 1e-3
    level = torch.full((2, CHUNK), LADDER[-1], dtype=torch.float64)
    noised = add_noise(real.latents[:, :CHUNK], ladder_noise()[3, :, :CHUNK], level)
    wanted = tiny_network()(noised, level, conditioning(), ChunkContext()).kv
    seen = mixed.contexts[1].chunks[0].layers[1][0]
    torch.testing.assert_close(seen[0], wanted.layers[1][0][0], atol=1e-12, rtol=0)
    again = add_noise(own.x0[:, :CHUNK], ladder_noise()[3, :, :CHUNK], level)
    wanted = tiny_network()(again, level, conditioning(), ChunkContext()).kv
    torch.testing.assert_close(seen[1], wanted.layers[1][0][1], atol=1e-12, rtol=0)


@pytest.mark.parametrize("first", [None, LADDER])
@pytest.mark.parametrize("commits", [True, False])
@pytest.mark.parametrize("pairing", ["caption", "prefix"])
def test_a_rollout_makes_as_many_calls_as_it_costs(first, commits, pairing):
    """Catches exits that are not drawn evenly, and passes that are priced and not made."""
    stage = matching_stage(
        DataForcing(p=0.0, pairing=pairing), ladder=TWO, first_ladder=first, commits=commits
    )
    calls: Counter[int] = Counter()  # by the first frame of the chunk
    student = stage.trained["student"]
    student.register_forward_pre_hook(lambda _, inputs: calls.update([inputs[3].next_frame]))
    for turn in range(4):
        exits = stage.exits(lambda name, options, turn=turn: draw().in_turn(name, options, turn))
        stage.roll_out(tiny_batch(with_noise=True), draw(first=2 * turn), NO_ROW, *exits)
    settings = [
        "rollout.frames=6",
        "rollout.chunk_frames=2",
        "rollout.ladder=[1000,500]",
        f"rollout.context={'clean' if commits else 'last_step'}",
    ]
    if first:
        settings.append("rollout.first_ladder=[1000,750,500,250]")
    config = load_config("tiny/dmd.yaml", settings)
    clip = Clip((1, 10, 100), (0, 0, 0), (4, 6), 5)  # what a pass is over shows in a sum
    passes = rollout_passes(config, after_real=pairing == "prefix")
    cost = sum(each.times * sum(clip.over(each.over).chunks) for each in passes)
    made = sum(calls[CHUNK * i] * 10**i for i in range(3)) / 4
    assert made == pytest.approx(cost)


def test_a_first_ladder_trains_all_of_its_steps():
    """Catches a first chunk whose later steps get no loss: its levels are those of its ladder."""
    stage = matching_stage(ladder=TWO, first_ladder=LADDER)
    seen: set[tuple[float, float]] = set()
    for turn in range(8):
        exits = stage.exits(lambda name, options, turn=turn: draw().in_turn(name, options, turn))
        record = stage.roll_out(tiny_batch(), draw(first=2 * turn), NO_ROW, *exits)
        levels: Tensor = record.sigma_exit[0]
        seen.add((float(levels[0]), float(levels[-1])))
        assert (levels[CHUNK:] == levels[-1]).all()
    assert {first for first, _ in seen} == set(LADDER)
    assert {later for _, later in seen} == set(TWO)


def test_a_real_clip_stands_for_the_past_at_the_same_level():
    """Catches given frames that are noised, and a clean past that is changed."""
    real = latents("real")
    assert real_past(real, draw(), 0.0) == (real, None)
    noised, level = real_past(real, draw(), 0.625, given=1)
    assert level is not None
    assert level[0].tolist() == [0.0] + [0.625] * (FRAMES - 1)
    assert torch.equal(noised[:, 0], real[:, 0])
    assert (noised[:, 1:] - real[:, 1:]).abs().max() > 0.5


@pytest.mark.parametrize(
    ("config", "settings", "said"),
    [
        ("tiny/stable.yaml", ["rollout.first_ladder=[1000]"], "stages dmd and dfd alone train"),
        ("tiny/dp_dmd.yaml", ["rollout.first_ladder=[1000]"], "stages dmd and dfd alone train"),
        ("tiny/causal.yaml", ["rollout.context=last_step"], "sees clean chunks"),
        (
            "tiny/dmd.yaml",
            ["rollout.context=last_step", "published.context_noise=true"],
            "always has a commit pass",
        ),
    ],
)
def test_what_a_stage_cannot_train_is_refused(config, settings, said):
    """Catches a setting that is taken, written into the student's file, and never trained."""
    with pytest.raises(ConfigError, match=said):
        load_config(config, settings)


@pytest.mark.parametrize("name", ["two_steps", "no_commit"])
def test_a_students_file_says_how_it_was_trained(name):
    """Catches a recipe that a stream would have to be told by hand."""
    from dataclasses import asdict

    config = load_config(f"tiny/{name}.yaml")
    recipe = recipe_of_rollout(asdict(config.rollout))
    assert len(recipe.ladder) == (2 if name == "two_steps" else 4)
    assert recipe.commits == (name == "two_steps")
    assert recipe.first_ladder is None
