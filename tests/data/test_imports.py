"""Data sets of other projects, in their own formats: LMDBs as Self-Forcing writes them, FastGen's
webdataset shards.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
import tarfile
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch
from torch import Tensor
from webdataset import ShardWriter

from selfforcing_dfd import rng
from selfforcing_dfd.cli.main import main
from selfforcing_dfd.data.format import PackError
from selfforcing_dfd.data.pack import PackOptions, pack
from selfforcing_dfd.data.shards import ShardReader
from selfforcing_dfd.data.sources.fastgen import FastGenSource
from selfforcing_dfd.data.sources.lmdb import LmdbSource
from selfforcing_dfd.tiny.text import TinyText

ROW = (3, 16, 4, 6)  # F, C, H, W: no two alike
PROMPTS = ["a disc moves left", "größer  and\nredder", "a cross", "a square"]


def draw(*labels: int) -> Tensor:
    return rng.normal(ROW, 0, "imported", *labels).half().float()


def write_lmdb(
    folder: Path, rows: dict[int, Tensor], prompts: list[str], shape: str | None = None
) -> Path:
    """An environment as the scripts of Self-Forcing and CausVid fill it: raw float16, ASCII shapes,
    written last.
    """
    environment = lmdb.open(str(folder), map_size=2**24)
    with environment.begin(write=True) as transaction:
        for number, latents in rows.items():
            transaction.put(f"latents_{number}_data".encode(), latents.half().numpy().tobytes())
            transaction.put(f"prompts_{number}_data".encode(), prompts[number].encode())
        stated = shape or " ".join(map(str, (len(rows), *next(iter(rows.values())).shape)))
        transaction.put(b"latents_shape", stated.encode())
        transaction.put(b"prompts_shape", str(len(rows)).encode())
    environment.close()
    return folder


def import_lmdb(source: LmdbSource, out: Path, **settings: Any) -> ShardReader:
    pack(source, out, None, TinyText(), PackOptions(**settings))
    return ShardReader(out)


@pytest.mark.parametrize("leading", [(), (1,)])
def test_clean_latents_of_an_lmdb_come_back(tmp_path: Path, leading: tuple[int, ...]) -> None:
    """Would catch C and F exchanged, and DFD's rows, which carry a leading one. Exact: both sides
    are float16.
    """
    rows = {number: draw(number).expand(*leading, *ROW) for number in range(4)}
    reader = import_lmdb(
        LmdbSource(write_lmdb(tmp_path / "lmdb", rows, PROMPTS)), tmp_path / "out", shard_size=3
    )
    reader.verify()
    assert reader.captions == [" ".join(prompt.split()) for prompt in PROMPTS]
    assert [entry.key for entry in reader.index.samples] == [
        f"row-00000{number}" for number in range(4)
    ]
    for number in range(4):
        assert reader[number].latents.equal(draw(number))
        assert reader[number].text.equal(
            TinyText().encode([reader.captions[number]])[0].half().float()
        )


@pytest.mark.parametrize(("step", "taken"), [(None, 4), (-1, 4), (0, 0), (2, 2)])
def test_a_trajectory_gives_the_latent_that_is_asked_for(
    tmp_path: Path, step: int | None, taken: int
) -> None:
    """Trajectories run from noise to clean: the first latent as data would teach noise."""
    rows = {number: torch.stack([draw(number, point) for point in range(5)]) for number in range(2)}
    folder = write_lmdb(tmp_path / "lmdb", rows, PROMPTS)
    source = LmdbSource(folder) if step is None else LmdbSource(folder, step)
    reader = import_lmdb(source, tmp_path / "out")
    assert [reader[number].latents.equal(draw(number, taken)) for number in range(2)] == [
        True,
        True,
    ]
    assert reader.index.about["source"]["step"] == taken


def test_a_folder_of_environments_is_one_data_set(tmp_path: Path) -> None:
    """Would catch rows of the second environment under the prompts of the first, and equal keys."""
    (tmp_path / "all").mkdir()
    for name, first in (("shard_0", 0), ("shard_1", 2)):
        rows = {number: draw(first + number) for number in range(2)}
        write_lmdb(tmp_path / "all" / name, rows, PROMPTS[first:])
    reader = import_lmdb(LmdbSource(tmp_path / "all"), tmp_path / "out")
    assert [reader[number].latents.equal(draw(number)) for number in range(4)] == [True] * 4
    assert reader.captions[2] == PROMPTS[2]
    assert len({entry.key for entry in reader.index.samples}) == 4


def test_rows_that_cannot_be_used_are_left_out_by_name(tmp_path: Path) -> None:
    """Would catch one broken row of thousands that stops the import, or is packed."""
    rows = {0: draw(0), 1: draw(1)[:2], 2: draw(2) * float("nan"), 3: draw(3)}
    folder = write_lmdb(
        tmp_path / "lmdb", rows, [*PROMPTS[:3], " "], shape="5 " + " ".join(map(str, ROW))
    )
    reader = import_lmdb(LmdbSource(folder), tmp_path / "out")
    assert len(reader) == 1
    assert [(refusal["file"], refusal["reason"]) for refusal in reader.index.refused] == [
        ("row-000001", "latents have 1536 bytes, want 2304 for float16 3 16 4 6"),
        ("row-000002", "its latents hold NaN or infinity"),
        ("row-000003", "no caption"),
        ("row-000004", "no latents_4_data in the LMDB"),
    ]
    with pytest.raises(PackError, match=r"row-000001: latents have 1536 bytes.*without --strict"):
        import_lmdb(LmdbSource(folder), tmp_path / "strict", strict=True)


def test_a_shape_that_lost_its_row_can_be_named(tmp_path: Path) -> None:
    """Self-Forcing's script takes the shape from its last file, which may have held nothing new:
    then only N is left.
    """
    folder = write_lmdb(tmp_path / "lmdb", {0: draw(0)}, PROMPTS, shape="1")
    with pytest.raises(
        PackError, match=r"latents_shape is lmdb: 1; want .* --row-shape, such as 21x16x60x104"
    ):
        LmdbSource(folder)
    reader = import_lmdb(LmdbSource(folder, row_shape=ROW), tmp_path / "out")
    assert reader[0].latents.equal(draw(0))


def test_what_is_no_such_lmdb_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a TypeError from a missing key, and an ImportError that does not say what to
    install.
    """
    with pytest.raises(PackError, match=r"no LMDB here; want a folder with data\.mdb"):
        LmdbSource(tmp_path)
    lmdb.open(str(tmp_path / "empty"), map_size=2**20).close()
    with pytest.raises(
        PackError, match="no key latents_shape, which is written last; it has no keys at all"
    ):
        LmdbSource(tmp_path / "empty")
    folder = write_lmdb(tmp_path / "lmdb", {0: draw(0)}, PROMPTS)
    with pytest.raises(PackError, match=r"--step 1: a sample of .* has 1 latents"):
        LmdbSource(folder, step=1)
    with pytest.raises(
        PackError, match=r"prompts without embeddings; name a text encoder with --text"
    ):
        pack(LmdbSource(folder), tmp_path / "out")
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(PackError, match="pip install lmdb"):
        LmdbSource(folder)


def test_an_interrupted_import_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for packing; would catch prompts of 30,000 rows encoded again after a crash, and another
    --step going on.
    """
    rows = {number: torch.stack([draw(number, point) for point in range(2)]) for number in range(4)}
    source = str(write_lmdb(tmp_path / "lmdb", rows, PROMPTS))
    arguments = [
        "import",
        source,
        "--text",
        "tiny",
        "--shard-size",
        "2",
        "--negative-prompt",
        "grey",
    ]
    assert main([*arguments, "--out", str(tmp_path / "once")]) == 0
    encode = TinyText.encode

    def failing(self: TinyText, captions: list[str]) -> Tensor:
        if captions == [PROMPTS[3]]:
            raise OSError("the disk is gone")
        return encode(self, captions)

    monkeypatch.setattr(TinyText, "encode", failing)
    assert main([*arguments, "--out", str(tmp_path / "twice")]) == 2
    monkeypatch.undo()
    assert main([*arguments, "--out", str(tmp_path / "twice"), "--resume", "--step", "0"]) == 2
    assert main([*arguments, "--out", str(tmp_path / "twice"), "--resume"]) == 0
    assert {p.name: p.read_bytes() for p in (tmp_path / "twice").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "once").iterdir()
    }


def pth(tensor: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return buffer.getvalue()


def npy(tensor: Tensor) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, tensor.numpy())
    return buffer.getvalue()


def embedding(number: int) -> Tensor:
    """[12, 32], zeros past four tokens; values that bfloat16 holds."""
    text = torch.zeros(12, 32)
    text[:4] = rng.normal((4, 32), 0, "embedding", number).bfloat16().float()
    return text


def sample(number: int, **changes: Any) -> dict[str, bytes]:
    """As FastGen expects them: latents [C, F, H, W] and padded embeddings, in bfloat16."""
    latents = draw(number).bfloat16().transpose(0, 1).contiguous()
    members = {
        "latent.pth": pth(latents),
        "txt_emb.pth": pth(embedding(number).bfloat16()),
        **changes,
    }
    return {
        "__key__": f"{number:05d}",
        **{name: value for name, value in members.items() if value is not None},
    }


def write_tars(folder: Path, samples: list[dict[str, bytes]], size: int = 2) -> Path:
    folder.mkdir()
    with ShardWriter(str(folder / "%05d.tar"), maxcount=size, verbose=0) as writer:
        for one in samples:
            writer.write(one)
    return folder


def import_fastgen(source: FastGenSource, out: Path, text: TinyText | None = None) -> ShardReader:
    pack(source, out, None, text)
    return ShardReader(out)


def test_fastgen_shards_come_back(tmp_path: Path) -> None:
    """Would catch C and F exchanged, and padding stored. Exact: bfloat16 of this size fits into
    float16.
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
    """The other names under which FastGen's loaders find the same things."""
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
    """Pairing within a caption needs to know which samples share one; would catch one caption for
    all.
    """
    same = pth(embedding(0).bfloat16())
    samples = [sample(0), sample(1), sample(2, **{"txt_emb.pth": same})]
    reader = import_fastgen(FastGenSource(write_tars(tmp_path / "tars", samples)), tmp_path / "out")
    assert reader.caption_ids == [0, 1, 0]


def test_captions_can_be_encoded_anew(tmp_path: Path) -> None:
    """Would catch stored embeddings of one encoder beside those of another."""
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
    """A .pth file is a program; would catch torch.load without weights_only."""
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
    """Would catch a clip of another length packed beside the rest, and a dictionary taken for a
    tensor.
    """
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
    """Would catch frames taken for channels. Wan has 16 channels: 16 frames of 3 channels are the
    other layout.
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


def test_the_command_tells_the_kinds_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Would catch a kind that has to be named although the files show it, and a source that is
    neither.
    """
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
