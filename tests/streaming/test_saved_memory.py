"""Ways of saving memory change where things are, and not what is seen."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipeline import PROMPT
from tiny_wan import HEIGHT, WIDTH

from selfforcing_dfd.cli.main import main
from selfforcing_dfd.codecs.text import WanText
from selfforcing_dfd.streaming import load_wan
from selfforcing_dfd.streaming.load import load_settings, load_stream_model
from selfforcing_dfd.streaming.load_wan import load_wan_model
from selfforcing_dfd.streaming.parts import LoadError
from selfforcing_dfd.streaming.saving import Saving
from selfforcing_dfd.streaming.session import StreamModel, StreamSession

SIZE = (HEIGHT, WIDTH)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def frames(model: StreamModel, chunks: int = 2) -> torch.Tensor:
    session = StreamSession(model, PROMPT, load_settings("default", seed=5))
    return torch.cat([session.next_chunk().frames for _ in range(chunks)])


def test_the_command_line_offloads_to_the_bit(tmp_path):
    """Catches an option that is read and not followed, and a group that comes too late."""
    made = {}
    for name, extra in {"plain": [], "groups": ["--offload", "2"], "alone": ["--offload"]}.items():
        file = tmp_path / f"{name}.y4m"
        assert main(["stream", "--chunks", "4", "--seed", "5", "--out", str(file), *extra]) == 0
        made[name] = file.read_bytes()
    assert made["plain"] == made["groups"] == made["alone"]
    model = load_stream_model(saving=Saving(group_size=2))
    assert model.student.groups is not None
    assert len(model.student.groups.groups) == 3


def test_the_command_line_takes_eight_bits(tmp_path):
    """Catches --fp8 that stream reads and does not follow, or follows so that nothing is left."""
    made = []
    for extra in ([], ["--fp8", "--offload"]):
        file = tmp_path / f"{len(extra)}.y4m"
        assert main(["stream", "--chunks", "1", "--seed", "5", "--out", str(file), *extra]) == 0
        made.append(torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8).double())
    assert not torch.equal(*made)
    assert float((made[0] - made[1]).square().mean()) < 30  # of 255: 33 dB


def test_groups_that_save_nothing_are_refused_in_words(capsys):
    """Catches a traceback in place of what to do."""
    assert main(["stream", "--offload", "3"]) == 2
    assert "6 blocks in groups of 3 are 2" in capsys.readouterr().err


def test_a_freed_text_encoder_is_gone_after_each_prompt(export, monkeypatch):
    """Catches 11 GB that stay, an encoder that is read before a new prompt, and other states."""
    loaded: list[weakref.ref[Any]] = []
    read = WanText.from_pretrained.__func__

    def spy(cls: type[WanText], *args: Any) -> WanText:
        text = read(cls, *args)
        loaded.append(weakref.ref(text.encoder))
        return text

    monkeypatch.setattr(WanText, "from_pretrained", classmethod(spy))
    freed = load_wan_model(export, size=SIZE, saving=Saving(text="free"))
    freed.text.load()
    assert not loaded
    first = freed.text.encode([PROMPT])
    gc.collect()
    assert [ref() for ref in loaded] == [None]
    freed.text.encode([PROMPT])
    assert len(loaded) == 1  # the embedding is on disk
    freed.text.encode(["a blue square"])
    assert len(loaded) == 2
    kept = load_wan_model(export, size=SIZE)
    assert torch.equal(kept.text.encode([PROMPT]), first)
    assert torch.equal(frames(kept), frames(freed))


@pytest.mark.parametrize(("text", "device"), [("keep", "cpu:0"), ("free", "cpu:0"), ("cpu", "cpu")])
def test_the_text_encoder_is_where_it_was_asked_for(export, monkeypatch, text, device):
    """Catches 11 GB on the GPU of someone who asked for the CPU. The student is on cpu:0."""
    monkeypatch.setattr(load_wan, "find_device", lambda name: torch.device("cpu", 0))
    asked = []
    monkeypatch.setattr(
        WanText, "cached", lambda folder, cache, device, *_, **options: asked.append(device)
    )
    load_wan_model(export, size=SIZE, saving=Saving(text=text))
    assert asked == [torch.device(device)]


def test_an_unknown_place_is_refused():
    """Catches a misspelt place that would mean the default."""
    with pytest.raises(LoadError, match="text is 'gpu'; use keep, cpu, free"):
        Saving(text="gpu")  # type: ignore[arg-type]
