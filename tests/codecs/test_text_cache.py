"""Embeddings of prompts kept on disk: the encoder's own bits, whole files, no needless loading."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_network
from tiny_text import (
    DIM,
    MAX_LENGTH,
    PROMPTS,
    Counting,
    save_text_folder,
    tiny_wan_text,
    unwanted,
    write_again_and_again,
)

from selfforcing_dfd import rng
from selfforcing_dfd.codecs.prompts import TextError, clean_prompt
from selfforcing_dfd.codecs.text import WanText
from selfforcing_dfd.codecs.text_cache import CachedText, read_entry, write_entry
from selfforcing_dfd.codecs.text_files import folder_fingerprint
from selfforcing_dfd.data.pack import pack
from selfforcing_dfd.data.shards import ShardReader
from selfforcing_dfd.data.sources.files import FileSource
from selfforcing_dfd.streaming.session import StreamModel, StreamSession, StreamSettings
from selfforcing_dfd.tiny.codec import TinyCodec
from selfforcing_dfd.tiny.text import TinyText
from selfforcing_dfd.tiny.world import write_clips


@pytest.fixture(scope="module")
def text() -> WanText:
    return tiny_wan_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder in several shards."""
    return save_text_folder(tmp_path_factory.mktemp("wan"), max_shard_size="10KB")


def test_cached_embeddings_are_the_encoders(text, tmp_path):
    """Catches an entry under another prompt's name, lost rows and extra rows.

    Prompts come in any order, for the first time and again.
    """
    encoder = Counting(text)
    cached = CachedText(encoder, tmp_path)
    alone = torch.cat([text.encode([prompt]) for prompt in PROMPTS])
    assert torch.equal(cached.encode([*PROMPTS, PROMPTS[0]]), torch.cat([alone, alone[:1]]))
    assert encoder.asked == PROMPTS
    assert torch.equal(cached.encode(PROMPTS[::-1]), alone.flip(0))
    assert encoder.asked == PROMPTS


def test_prompts_that_clean_alike_share_an_entry_and_are_cleaned_once(text, tmp_path):
    """Catches a prompt cleaned by both the cache and the encoder.

    Entities would be decoded four times.
    """
    encoder = Counting(text)
    cached = CachedText(encoder, tmp_path)
    deep = "<b> &amp;amp;amp;lt;"  # beside a tag ftfy leaves entities alone
    assert clean_prompt(clean_prompt(deep)) != clean_prompt(deep)
    assert torch.equal(cached.encode([deep]), text.encode([deep]))
    cached.encode([f" {deep}\n"])
    assert encoder.asked == [deep]


def test_files_hold_no_padding_and_half_precision_where_that_is_exact(tmp_path):
    """Catches 8 MB a prompt: 512 rows of 4096 values in float32."""
    for name, dtype in (("half", torch.bfloat16), ("full", torch.float32)):
        text = tiny_wan_text(max_length=512, dtype=dtype)
        cached = CachedText(text, tmp_path / name)
        first = cached.encode(["a disc"])
        assert load_file(cached.path("a disc"))["text"].shape == (3, DIM)
        assert load_file(cached.path("a disc"))["text"].dtype == dtype
        assert torch.equal(cached.encode(["a disc"]), first)


def test_the_encoder_is_not_loaded_when_every_prompt_is_cached(folder, tmp_path):
    """Catches 11 GB read for nothing, at every start of training and streaming."""
    warm = WanText.cached(folder, tmp_path, dtype=torch.float32, max_length=MAX_LENGTH)
    expected = warm.encode(PROMPTS)
    cold = CachedText(unwanted, tmp_path, folder_fingerprint(folder, torch.float32, MAX_LENGTH))
    assert cold.fingerprint == warm.fingerprint
    assert torch.equal(cold.encode(PROMPTS[::-1]), expected.flip(0))
    with pytest.raises(AssertionError, match="was loaded"):
        cold.encode(["a new prompt"])


def test_nothing_heavy_is_imported_until_an_encoder_is_loaded():
    """Catches `import transformers` at the top of a module.

    A stream whose prompts are all cached would wait five seconds for it.
    """
    code = "import sys, selfforcing_dfd.codecs.text; print('transformers' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_an_encoder_other_than_announced_is_refused(text, tmp_path):
    """Catches one model's embeddings filed under another's name."""
    with pytest.raises(TextError, match="needs its fingerprint now"):
        CachedText(lambda: text, tmp_path)
    with pytest.raises(
        TextError, match=r"the text encoder is umt5-\w+, the cache was opened for umt5-other"
    ):
        CachedText(lambda: text, tmp_path, "umt5-other").encode(["a disc"])


def cut(content: bytes) -> bytes:
    return content[:-5]


def empty(content: bytes) -> bytes:
    return b""


def flip_a_bit(content: bytes) -> bytes:
    return content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]


def change_the_prompt(content: bytes) -> bytes:
    return content.replace(b'"prompt":"a disc"', b'"prompt":"a ring"')


@pytest.mark.parametrize("damage", [cut, empty, flip_a_bit, change_the_prompt])
def test_a_damaged_entry_is_made_again_with_a_warning(text, tmp_path, caplog, damage):
    """Catches a crash, or a silently wrong embedding, after a full disk or a bad one."""
    encoder = Counting(text)
    cached = CachedText(encoder, tmp_path)
    expected = cached.encode(["a disc"])
    path = cached.path("a disc")
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(cached.encode(["a disc"]), expected)
    assert f"{path} is damaged" in caplog.text
    assert torch.equal(cached.encode(["a disc"]), expected)
    assert encoder.asked == ["a disc"] * 2


def test_two_processes_may_write_the_same_entry(tmp_path, caplog):
    """Catches an entry written in place.

    A reader would find half of it, and a second writer would mix with the first.
    """
    states = rng.normal((512, 256), 0, "states")
    path = tmp_path / "entry.safetensors"
    write_entry(path, states, "a disc")
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=write_again_and_again, args=(path, states)) for _ in range(2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert read_entry(path, "a disc") is not None, caplog.text
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    """Catches a folder that fills with halves of files when the disk is full."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("selfforcing_dfd.common.Path.replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_entry(tmp_path / "entry.safetensors", torch.ones(4, 2), "a disc")
    assert list(tmp_path.iterdir()) == []


def test_any_text_encoder_can_be_cached(tmp_path):
    """Catches a cache that only knows UMT5: the tiny world's empty caption has no rows at all."""
    text = TinyText()
    cached = CachedText(text, tmp_path)
    for _ in range(2):
        assert torch.equal(cached.encode(["a disc moves", ""]), text.encode(["a disc moves", ""]))


def test_packs_and_streams(text, tmp_path):
    """Catches a method, device or dtype that packing and sessions need and the cache lacks."""
    write_clips(tmp_path / "clips", 1, seed=0, level="short", num_frames=9)
    basis = [
        torch.linalg.qr(rng.normal((size, 16), 0, "basis", size)).Q.contiguous()
        for size in (192, 768)
    ]
    codec = TinyCodec(*basis, 1.0)
    cached = CachedText(text, tmp_path / "cache")
    source = FileSource(tmp_path / "clips", 9, (64, 64))
    pack(source, tmp_path / "shards", codec, cached)
    assert ShardReader(tmp_path / "shards").index.fingerprints["text"] == text.fingerprint
    student = tiny_network(
        dtype=torch.float32, in_channels=16, out_channels=16, text_dim=DIM
    ).requires_grad_(False)
    model = StreamModel(student, codec, cached, (1.0, 0.625), 2, (4, 4))
    settings = StreamSettings(sink_frames=0, window_frames=4)
    frames = [
        StreamSession(model, prompt, settings).next_chunk().frames
        for prompt in ("a disc", "a cross")
    ]
    assert not torch.equal(*frames)


def test_an_encoder_that_fails_does_not_stay(text, tmp_path):
    """Catches 11 GB on a GPU that were to be freed, kept after a prompt that was refused."""
    loaded: list[weakref.ref[Counting]] = []

    def load() -> Counting:
        if not loaded:
            encoder = Counting(text)
            loaded.append(weakref.ref(encoder))
            return encoder
        raise TextError("no memory")

    def refuse(encoder: Counting, captions: list[str]) -> torch.Tensor:
        raise TextError("not finite")

    cached = CachedText(load, tmp_path, text.fingerprint, keeps=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Counting, "encode", refuse)
        with pytest.raises(TextError, match="not finite"):
            cached.encode([PROMPTS[0]])
    gc.collect()
    assert [ref() for ref in loaded] == [None]
    with pytest.raises(TextError, match="no memory"):  # and not that there is none to free
        cached.encode([PROMPTS[0]])
