"""Counted operations of a study's runs, against networks that really ran."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from selfforcing_dfd.common import UserError
from selfforcing_dfd.data.shards import ShardReader
from selfforcing_dfd.stages.config_files import change
from selfforcing_dfd.study.operations import noise_gflop, training_gflop
from selfforcing_dfd.study.plan import load_plan, runs_of
from selfforcing_dfd.study.results import noise_cost
from selfforcing_dfd.study.work import noise_file, prepare, with_stored_noise
from selfforcing_dfd.training.inversion import build_inversion


@pytest.mark.parametrize(("pairing", "tolerance"), [("prefix", 1e-9), ("inversion", 0.015)])
def test_noise_costs_what_its_chunks_cost(plan: Path, pairing: str, tolerance: float):
    """Catches the noise of later chunks charged to arms that do not use it, and calls left out.

    Exact for first chunks. For all chunks within 1.5 %: the estimate counts the text's K/V once for
    all chunks, the inversion makes them for each.
    """
    prepare(load_plan(str(plan)))
    config = change(runs_of(load_plan(str(plan)))[1].config, [f"dfd.pairing={pairing}"])
    reader = ShardReader(config.data.shards)
    rows, num_clips = 2, len(reader)
    samples = [reader[number] for number in range(rows)]
    frames = config.rollout.chunk_frames if pairing == "prefix" else config.rollout.frames
    latents = torch.stack([each.latents for each in samples])[:, :frames].float()
    text = torch.stack([each.text for each in samples]).float()
    short = change(config, [f"rollout.frames={frames}"])
    invert = build_inversion(short, config.data.tiny.noise_steps).invert
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        invert(latents, text, torch.randn_like(latents))
    each = counter.get_total_flops() / rows
    assert noise_gflop(config) * 1e9 == pytest.approx(num_clips * each, rel=tolerance)


def test_training_costs_by_its_updates(plan: Path):
    """Catches a cost that is the whole run's at every point."""
    config = runs_of(load_plan(str(plan)))[0].config
    prepare(load_plan(str(plan)))
    one, two, five = training_gflop(config, [1, 2, 5])
    assert (two, five) == (pytest.approx(2 * one), pytest.approx(5 * one))
    missing = change(config, [f"weights.teacher={plan.parent}/none.safetensors"])
    with pytest.raises(UserError, match=r"none\.safetensors"):
        training_gflop(missing, [1])


def test_shards_of_the_base_are_made_too(plan: Path):
    """Catches rows of data and teacher that fail where every arm has other shards."""
    own = f"data.shards={plan.parent}/own"
    for stage in ("run.stage=dmd", "dfd.pairing=prefix"):
        plan.write_text(plan.read_text().replace(f"set: [{stage}]", f"set: [{stage}, {own}]"))
    prepare(load_plan(str(plan)))
    assert ShardReader(plan.parent / "own").has_noise
    assert len(ShardReader(plan.parent / "shards")) == 8


def test_the_cost_of_noise_is_that_of_the_first_time(plan: Path):
    """Catches a second preparation that finds nothing to do and notes that noise costs nothing."""
    own = f"data.shards={plan.parent}/own"
    plan.write_text(plan.read_text().replace("dfd.pairing=prefix", f"dfd.pairing=prefix, {own}"))
    prepare(load_plan(str(plan)))
    runs = runs_of(load_plan(str(plan)))
    noted = noise_file(with_stored_noise(runs)[0])
    first = noted.read_text()
    prepare(load_plan(str(plan)))
    assert noted.read_text() == first
    assert noise_cost(runs) == json.loads(first)["core_seconds"] > 0
    assert not ShardReader(plan.parent / "shards").has_noise
