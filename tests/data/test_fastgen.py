"""FastGen's webdataset shards of latents, and the command that imports them."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from imported_data import PROMPTS, draw, embedding, npy, pth, sample, write_lmdb, write_tars

from selfforcing_dfd.cli.main import main
from selfforcing_dfd.data.format import PackError
from selfforcing_dfd.data.pack import pack
from selfforcing_dfd.data.shards import ShardReader
from selfforcing_dfd.data.source import ClipError
from selfforcing_dfd.data.sources.fastgen import FastGenSource
from selfforcing_dfd.tiny.text import TinyText


def import_fastgen(source: FastGenSource, out: Path, text: TinyText | None = None) -> ShardReader:
    pack(source, out, None, text)
    return ShardReader(out)


def test_fastgen_shards_come_back(tmp_path: Path) -> None:
    """Catches C and F exchanged, and padding stored.

    Exact: bfloat16 of this size fits into float16.
    """
    folder = write_tars(
        tmp_path / "tars", [sample(number, txt=PROMPTS[number].encode()) for number in range(3)]
    )
    np.save(folder / "neg_prompt_emb.npy", embedding(9).numpy())
    reader = import_fastgen(FastGenSource(folder), tmp_path / "out")
    reader.verify()
    assert [entry.caption for entry in reader.index.samples] == [
        " ".join(prompt.split()) for prompt in PROMPTS[:3]
    ]
    for number in range(3):
        assert reader[number].latents.equal(draw(number).bfloat16().half().float())
        assert reader[number].text.equal(embedding(number).half().float())
        assert np.load(io.BytesIO(reader.members(number)["text.npy"])).shape == (4, 32)
    assert reader.negative is not None and reader.negative.equal(embedding(9).half().float())


def test_npy_members_json_captions_and_a_negative_prompt_in_the_samples(tmp_path: Path) -> None:
    """Catches the other names of the same things, which FastGen's loaders know, left unread."""
    changes = {
        "latent.pth": None,
        "latents.npy": npy(draw(0).transpose(0, 1)),
        "txt_emb.pth": None,
        "text_embedding.npy": npy(embedding(0)[None]),
        "neg_txt_emb.pth": pth(embedding(9)),
        "json": json.dumps({"prompt": "a disc"}).encode(),
    }
    reader = import_fastgen(
        FastGenSource(write_tars(tmp_path / "tars", [sample(0, **changes)])), tmp_path / "out"
    )
    assert reader[0].latents.equal(draw(0))
    assert reader[0].text.equal(embedding(0).half().float())
    assert reader[0].caption == "a disc"
    assert reader.negative is not None and reader.negative.equal(embedding(9).half().float())


def test_samples_of_one_prompt_share_a_caption_without_captions(tmp_path: Path) -> None:
    """Catches one made-up caption for all samples without one.

    Pairing within a caption needs to know which samples share one.
    """
    same = pth(embedding(0).bfloat16())
    samples = [sample(0), sample(1), sample(2, **{"txt_emb.pth": same})]
    reader = import_fastgen(FastGenSource(write_tars(tmp_path / "tars", samples)), tmp_path / "out")
    assert [reader.captions.index(caption) for caption in reader.captions] == [0, 1, 0]


def test_captions_can_be_encoded_again(tmp_path: Path) -> None:
    """Catches stored embeddings of one encoder beside those of another."""
    samples = [sample(0, txt=b"a disc"), sample(1)]
    reader = import_fastgen(
        FastGenSource(write_tars(tmp_path / "tars", samples)), tmp_path / "out", TinyText()
    )
    assert reader[0].text.equal(TinyText().encode(["a disc"])[0].half().float())
    assert [refusal["reason"] for refusal in reader.index.refused] == ["no caption"]


class Malicious:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("saved_by", ["torch", "pickle"])
def test_a_pickle_with_code_is_refused_and_never_run(tmp_path: Path, saved_by: str) -> None:
    """Catches torch.load without weights_only. A .pth file is a program."""
    harmful = Malicious(tmp_path / "trace")
    content = pth({"latent": harmful}) if saved_by == "torch" else pickle.dumps(harmful, protocol=2)
    samples = [sample(0), sample(1, **{"latent.pth": content})]
    reader = import_fastgen(FastGenSource(write_tars(tmp_path / "tars", samples)), tmp_path / "out")
    assert not (tmp_path / "trace").exists()
    assert len(reader) == 1
    (refusal,) = reader.index.refused
    assert refusal["file"] == "00001"
    assert (
        "holds Python objects other than tensors, which could run code and are never loaded"
        in refusal["reason"]
    )


def test_fastgen_samples_that_cannot_be_used_are_left_out_by_name(tmp_path: Path) -> None:
    """Catches a clip of another length beside the rest, and a dictionary taken for a tensor."""
    samples = [
        sample(0),
        sample(1, **{"latent.pth": pth(draw(1).transpose(0, 1)[:, :2])}),
        sample(2, **{"latent.pth": pth({"latents": draw(2)})}),
        sample(3, **{"latent.pth": b"cut"}),
        sample(4, **{"latent.pth": None}),
        sample(5, **{"txt_emb.pth": None}),
        sample(6, **{"txt_emb.pth": pth(torch.ones(13, 32))}),
    ]
    reader = import_fastgen(
        FastGenSource(write_tars(tmp_path / "tars", samples, 10)), tmp_path / "out"
    )
    assert len(reader) == 1
    reasons = [refusal["reason"] for refusal in reader.index.refused]
    wanted = [
        "its latents are [2, 16, 4, 6], those of the first sample [3, 16, 4, 6]",
        "holds dict, want one tensor",
        "is damaged, or holds Python objects",
        "no latent.pth or latents.npy; it has txt_emb.pth",
        "no text embedding; name a text encoder with --text",
        "its text embedding is [13, 32], that of the first sample [12, 32]",
    ]
    assert len(reasons) == len(wanted)
    assert all(reason.startswith(want) for reason, want in zip(reasons, wanted, strict=True))


def test_latents_in_our_own_layout_are_noticed(tmp_path: Path) -> None:
    """Catches frames taken for channels.

    Wan has 16 channels: 16 frames of 3 channels are the other layout.
    """
    ours = [sample(0, **{"latent.pth": pth(draw(0))})]
    folder = write_tars(tmp_path / "tars", ours)
    with pytest.raises(
        PackError,
        match=r"latents are \[3, 16, 4, 6\], which looks like \[F, C, H, W\]; .*--layout fchw",
    ):
        FastGenSource(folder)
    assert import_fastgen(FastGenSource(folder, "fchw"), tmp_path / "out")[0].latents.equal(
        draw(0).half().float()
    )


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize("damage", ["header", "cut", "zeros"])
def test_a_damaged_tar_is_refused(tmp_path: Path, damage: str) -> None:
    """Catches samples lost without a word: tarfile takes a damaged header for the archive's end."""
    tar = write_tars(tmp_path / "tars", [sample(number) for number in range(4)], 4) / "00000.tar"
    with tarfile.open(tar) as members:
        third = members.getmembers()[4].offset
    data = tar.read_bytes()
    block = bytes(tarfile.BLOCKSIZE)
    harmed = {
        "header": flip(data, third),
        "cut": data[:third],
        "zeros": data[:third] + block + data[third + len(block) :],
    }
    tar.write_bytes(harmed[damage])
    with pytest.raises(
        PackError,
        match=rf"00000\.tar: damaged or cut off at byte {third} of \d+, after 2 samples; copy it",
    ):
        FastGenSource(tmp_path / "tars")


def test_an_embedding_that_is_not_finite_is_one_sample_lost(tmp_path: Path) -> None:
    """Catches one NaN that ends the whole import."""
    broken = sample(1, **{"txt_emb.pth": pth(embedding(1) / 0)})
    folder = write_tars(tmp_path / "tars", [sample(0), broken, sample(2)])
    reader = import_fastgen(FastGenSource(folder), tmp_path / "out")
    assert [entry.key for entry in reader.index.samples] == ["00000_00000", "00001_00002"]
    (refusal,) = reader.index.refused
    assert refusal["reason"] == "its text embedding holds NaN or infinity"


def test_the_command_tells_the_kinds_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a format that must be named although the files show it, or that is neither."""
    tars = write_tars(tmp_path / "tars", [sample(0)])
    assert main(["import", str(tars), "--out", str(tmp_path / "a")]) == 0
    rows = write_lmdb(tmp_path / "lmdb", {0: draw(0)}, PROMPTS)
    assert main(["import", str(rows), "--out", str(tmp_path / "b"), "--text", "tiny"]) == 0
    assert ShardReader(tmp_path / "a").index.about["source"]["kind"] == "fastgen"
    assert ShardReader(tmp_path / "b").index.about["source"]["kind"] == "lmdb"
    capsys.readouterr()
    assert main(["import", str(rows), "--out", str(tmp_path / "c")]) == 2
    assert "--text umt5 needs --model DIR" in capsys.readouterr().err
    (tmp_path / "none").mkdir()
    assert main(["import", str(tmp_path / "none"), "--out", str(tmp_path / "c")]) == 2
    assert "want a folder with data.mdb (LMDB)" in capsys.readouterr().err
    with tarfile.open(tmp_path / "none" / "0.tar", "w:gz"):
        assert main(["import", str(tmp_path / "none"), "--out", str(tmp_path / "c")]) == 2
    assert "cannot be read as an uncompressed tar" in capsys.readouterr().err


def test_a_flipped_bit_of_a_value_is_found(tmp_path: Path) -> None:
    """Catches what torch.load does not look at: of 300 flipped bits, 91 gave another tensor."""
    folder = write_tars(tmp_path / "tars", [sample(number) for number in range(3)], size=3)
    (tar,) = folder.glob("*.tar")
    whole = tar.read_bytes()
    with tarfile.open(tar) as members:
        info = next(each for each in members if each.name == "00001.latent.pth")
    harmed = bytearray(whole)
    harmed[info.offset_data + info.size // 2] ^= 1
    tar.write_bytes(harmed)
    source = FastGenSource(folder)
    assert source.read(0).latents is not None
    with pytest.raises(ClipError, match=r"00001.*the checksum of .*data/0 in it differs"):
        source.read(1)


@pytest.mark.parametrize("content", [b"\x80\x04.", b"", b"PK\x03\x04", b"\x93NUMPY", bytes(2000)])
def test_members_that_hold_no_tensor_are_left_out(tmp_path: Path, content: bytes) -> None:
    """Catches an error of torch's unpickler that ends the whole import."""
    samples = [sample(0), sample(1, **{"latent.pth": content})]
    source = FastGenSource(write_tars(tmp_path / "tars", samples))
    with pytest.raises(ClipError, match=r"00001: (cannot be read|is damaged)"):
        source.read(1)
