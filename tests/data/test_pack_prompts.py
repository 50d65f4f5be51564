"""Prompts without clips: the same shards but for the latents, and what may be trained on them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from selfforcing_dfd.cli.main import main
from selfforcing_dfd.data.format import PackError
from selfforcing_dfd.data.order import SampleOrder, load_batch
from selfforcing_dfd.data.pack import PackOptions, pack
from selfforcing_dfd.data.shards import ShardReader
from selfforcing_dfd.data.sources.prompts import PromptSource
from selfforcing_dfd.tiny.text import TinyText

SHAPE = (9, 16, 8, 8)


def pack_prompts(path, out, **options):
    return pack(PromptSource(path, SHAPE), out, None, TinyText(), PackOptions(**options))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text(
        "a disc moves\n\n  a cross   moves\n"
        "one two three four five six seven eight nine ten eleven twelve thirteen\n"
        + "a square moves\n"
        * 20
    )
    return path


def test_prompts_become_samples_of_zeros(prompts, tmp_path):
    """Catches blank lines, prompts out of order, and text that `pack` would not have stored."""
    summary = pack_prompts(prompts, tmp_path / "out")
    reader = ShardReader(tmp_path / "out")
    assert not reader.has_clips
    assert reader.captions[:2] == ["a disc moves", "a cross moves"]
    assert torch.equal(reader[1].text, TinyText().encode(["a cross moves"])[0].half().float())
    assert torch.equal(reader[0].latents, torch.zeros(SHAPE))
    batch = load_batch(reader, SampleOrder(len(reader), 0), 0, 2)
    assert not batch.has_clips
    assert summary.num_samples == len(reader)
    reader.verify()


def test_a_prompt_that_is_refused_takes_no_other_with_it(prompts, tmp_path):
    """Catches a batch of sixteen that is lost for one word; --strict names the line."""
    summary = pack_prompts(prompts, tmp_path / "out")
    assert [refusal.file for refusal in summary.refused] == ["line 4"]
    assert summary.num_samples == 22
    with pytest.raises(PackError, match="line 4: caption has 13 words"):
        pack_prompts(prompts, tmp_path / "strict", strict=True)


def test_the_command_says_what_it_cannot_use(prompts, tmp_path, capsys):
    """Catches a size that the model cannot make and that the first update finds, hours later."""
    out = ("--out", str(tmp_path / "out"), "--text", "tiny")
    for size, frames in (("64x60", "33"), ("64x64", "32")):
        assert main(["prompts", str(prompts), *out, "--size", size, "--frames", frames]) == 2
        assert "such as 81 frames of 480x832" in capsys.readouterr().err
    assert main(["prompts", str(prompts), *out, "--size", "64x64", "--frames", "33"]) == 0
    assert "left out line 4: caption has 13 words" in capsys.readouterr().out
    assert ShardReader(tmp_path / "out").index.latent_shape == SHAPE
    with pytest.raises(PackError, match="no such file"):
        pack_prompts(tmp_path / "none.txt", tmp_path / "other")


def test_output_options_reach_the_shards(prompts, tmp_path, capsys):
    """Catches --strict, --overwrite, --resume or --float32 being taken and not handed on."""
    command = [
        "prompts",
        str(prompts),
        "--out",
        str(tmp_path / "out"),
        "--text",
        "tiny",
        "--size",
        "64x64",
        "--frames",
        "33",
    ]
    assert main([*command, "--strict"]) == 2
    assert "line 4: caption has 13 words" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(command) == 0
    assert main(command) == 2
    assert "exists" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0  # it is finished: nothing to do
    assert main([*command, "--overwrite", "--float32"]) == 0
    assert torch.equal(
        ShardReader(tmp_path / "out")[0].text, TinyText().encode(["a disc moves"])[0]
    )
