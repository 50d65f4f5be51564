"""Conversion of weights: bit for bit, readable by the programs of each format, all or nothing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from golden_weights import FOLDER, SIZES
from safetensors.torch import load_file
from tiny_models import TINY, conditioning, latents, tiny_network
from wan_files import HEAD_DIM, same, wan_folder, wan_state

from selfforcing_dfd import common
from selfforcing_dfd.cli.main import main
from selfforcing_dfd.models.identity import Recipe, mark, recipe_of
from selfforcing_dfd.weights.names import to_wan
from selfforcing_dfd.weights.read import WeightsError, load_network, read_weights
from selfforcing_dfd.weights.write import FORMATS, convert, parse_bytes

RECIPE = Recipe(
    ladder=(1000.0, 500.0),
    shift=8.0,
    chunk_frames=1,
    frames=7,
    sink=2,
    window=5,
    first_ladder=(1000.0, 750.0),
)
"""Of a student; no setting has Self-Forcing's value."""


def digest(path: Path) -> dict[str, str]:
    """Hash of a file, or of each file of a folder."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {
        file.name if path.is_dir() else "": hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return wan_folder(tmp_path / "original", wan_state())


@pytest.mark.parametrize("first", FORMATS)
@pytest.mark.parametrize("second", FORMATS)
def test_every_way_there_and_back_keeps_every_bit(first, second, original, tmp_path):
    """Catches a cast, a transposed tensor or a lost size on one of sixteen ways.

    Sizes are kept although no shape shows them.
    """
    convert(original, tmp_path / "one", first, max_shard_bytes=60_000)
    convert(tmp_path / "one", tmp_path / "two", second)
    same(load_network(tmp_path / "two"))
    assert (
        load_network(tmp_path / "two").config["num_attention_heads"] == TINY["num_attention_heads"]
    )
    convert(tmp_path / "two", tmp_path / "again", first, max_shard_bytes=60_000)
    assert digest(tmp_path / "again") == digest(tmp_path / "one")


def test_mixed_dtypes_are_kept(tmp_path):
    """Catches weights of one dtype.

    diffusers keeps embedders and tables in float32 beside bfloat16.
    """
    state = {name: t if "modulation" in name else t.bfloat16() for name, t in wan_state().items()}
    source = wan_folder(tmp_path / "mixed", state)
    for i, to in enumerate((*FORMATS, "wan")):
        convert(source, tmp_path / f"{i}", to)
        source = tmp_path / f"{i}"
    same(load_network(source), state)


def test_diffusers_reads_its_format_and_computes_the_same(original, tmp_path):
    """Catches a config or names that only this package understands.

    Tolerance: diffusers makes the timestep's sinusoid in float32, this package in float64; 4e-5
    apart at t = 1000 on the embedding, less on the flow of order one.
    """
    convert(original, tmp_path / "d", "diffusers", max_shard_bytes=60_000)
    theirs, report = WanTransformer3DModel.from_pretrained(tmp_path / "d", output_loading_info=True)
    assert not any(report[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
    own = WanTransformer3DModel(**TINY).config  # every setting, text-to-video's by default
    written = json.loads((tmp_path / "d" / "config.json").read_text())
    assert written.pop("role") == "teacher", "it is Wan's own; diffusers ignores the note"
    assert {k: v for k, v in written.items() if k[0] != "_"} == {
        k: v for k, v in json.loads(json.dumps(own)).items() if k[0] != "_"
    }
    x = latents("x", dtype=torch.float32)
    text = conditioning(dtype=torch.float32)
    expected = theirs(x.transpose(1, 2), torch.full((2,), 700.0), text.text, return_dict=False)[
        0
    ].transpose(1, 2)
    torch.testing.assert_close(
        load_network(tmp_path / "d")(x, 0.7, text).flow, expected, atol=5e-5, rtol=0
    )


def test_the_original_format_is_wans_own(tmp_path):
    """Catches a folder that the original code refuses.

    It needs file names, tensor names, and the released config's keys.
    """
    golden = FOLDER / "weights.safetensors"
    convert(golden, tmp_path / "w", "wan", head_dim=SIZES["attention_head_dim"])
    written = load_file(tmp_path / "w" / "diffusion_pytorch_model.safetensors")
    wanted = load_file(golden)
    assert set(written) == set(wanted) and all(
        torch.equal(tensor, wanted[name]) for name, tensor in written.items()
    )
    config = json.loads((tmp_path / "w" / "config.json").read_text())
    keys = {
        "_class_name",
        "_diffusers_version",
        "dim",
        "eps",
        "ffn_dim",
        "freq_dim",
        "in_dim",
        "model_type",
        "num_heads",
    }
    assert set(config) == keys | {"num_layers", "out_dim", "text_len", "text_dim"}, (
        "text_dim: it is not Wan's 4096 here"
    )
    assert (config["_class_name"], config["model_type"], config["dim"]) == ("WanModel", "t2v", 48)


def test_self_forcing_reads_its_format(original, tmp_path):
    """Catches an entry or prefix that Self-Forcing does not load.

    It loads `generator` strictly.
    """
    convert(original, tmp_path / "w.pt", "self-forcing")
    content = torch.load(tmp_path / "w.pt", weights_only=True)
    assert set(content["generator"]) == {f"model.{name}" for name in wan_state()}


def test_one_file_tells_its_sizes(original, tmp_path):
    """Catches a file that only its author knows the number of heads of."""
    convert(original, tmp_path / "w.safetensors", "single-file")
    assert {to_wan(name) for name in load_file(tmp_path / "w.safetensors")} == set(wan_state())
    assert read_weights(tmp_path / "w.safetensors").config["attention_head_dim"] == HEAD_DIM


@pytest.mark.parametrize("to", FORMATS)
def test_a_student_stays_one_with_its_recipe(to, tmp_path):
    """Catches a student that is taken for Wan's bidirectional transformer after a conversion."""
    network = tiny_network(dtype=torch.float32)
    mark(network, "causal_student", RECIPE)
    network.save_pretrained(tmp_path / "network")
    convert(tmp_path / "network", tmp_path / "w", to)
    found = load_network(tmp_path / "w")
    assert found.config["role"] == "causal_student"
    assert recipe_of(found.config) == RECIPE


def test_an_unknown_role_is_not_made_up(tmp_path):
    """Catches a bare state dict that gets a role, and a role that contradicts the source."""
    torch.save(wan_state(), tmp_path / "raw.pt")
    for to in ("self-forcing", "single-file"):
        convert(tmp_path / "raw.pt", tmp_path / to, to, head_dim=HEAD_DIM)
        assert read_weights(tmp_path / to).role is None
        convert(tmp_path / to, tmp_path / f"{to} student", "diffusers", role="causal_student")
        assert read_weights(tmp_path / f"{to} student").role == "causal_student"
    with pytest.raises(WeightsError, match="its role is causal_student; leave role teacher out"):
        convert(tmp_path / f"{to} student", tmp_path / "x", "wan", role="teacher")


def test_another_dtype_is_rounded_once_and_never_to_infinity(tmp_path):
    """Catches float16 of a value that it cannot hold: the model would be infinite, silently."""
    state = wan_state()
    convert(wan_folder(tmp_path / "a", state), tmp_path / "half", "diffusers", dtype=torch.bfloat16)
    same(
        load_network(tmp_path / "half"), {name: tensor.bfloat16() for name, tensor in state.items()}
    )
    state["head.head.bias"][3] = 1e5
    with pytest.raises(
        WeightsError, match=r"proj_out.bias has values up to 1e\+05, too large for torch.float16"
    ):
        convert(wan_folder(tmp_path / "b", state), tmp_path / "c", "diffusers", dtype=torch.float16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "half"], (
        "nothing half-written is left"
    )


@pytest.mark.parametrize("to", ["diffusers", "single-file"])
def test_what_is_there_is_replaced_only_when_asked(to, original, tmp_path):
    """Catches an export over last week's best student."""
    other = wan_folder(tmp_path / "other", wan_state(1))
    convert(other, tmp_path / "w", to)
    before = digest(tmp_path / "w")
    with pytest.raises(WeightsError, match="exists; name another place, or replace it"):
        convert(original, tmp_path / "w", to)
    assert digest(tmp_path / "w") == before
    convert(original, tmp_path / "w", to, overwrite=True)
    same(load_network(tmp_path / "w"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["original", "other", "w"]


def test_a_folder_with_anything_else_is_never_replaced(original, tmp_path):
    """Catches --overwrite on the wrong folder: a home, a repository, a whole pipeline."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(WeightsError, match=r"more than an export: thesis.txt"):
        convert(original, tmp_path / "mine", "diffusers", overwrite=True)
    with pytest.raises(WeightsError, match="is a folder, which single-file is not"):
        convert(original, tmp_path / "mine", "single-file", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("to", FORMATS)
def test_a_failure_leaves_what_was_there(to, original, tmp_path, monkeypatch):
    """Catches a full disk, or a kill, in the middle of replacing an export."""
    convert(original, tmp_path / "w", to)
    before = digest(tmp_path / "w")

    def fail(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(common, "sync", fail)
    with pytest.raises(OSError, match="No space left"):
        convert(wan_folder(tmp_path / "other", wan_state(1)), tmp_path / "w", to, overwrite=True)
    assert digest(tmp_path / "w") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["original", "other", "w"]


def test_the_command(original, tmp_path, capsys):
    """Catches a command that works from Python only.

    It prints what it read, wrote and could not find out.
    """
    assert (
        main(
            [
                "convert",
                str(original),
                str(tmp_path / "d"),
                "--to",
                "diffusers",
                "--max-shard-size",
                "60KB",
            ]
        )
        == 0
    )
    assert "original Wan folder" in capsys.readouterr().out
    assert len(list((tmp_path / "d").glob("*.safetensors"))) > 1
    torch.save({"generator": wan_state(), "critic": wan_state(1)}, tmp_path / "sf.pt")
    convert_sf = [
        "convert",
        str(tmp_path / "sf.pt"),
        str(tmp_path / "s"),
        "--to",
        "single-file",
        "--entry",
        "critic",
    ]
    assert main([*convert_sf, "--head-dim", str(HEAD_DIM), "--dtype", "bfloat16"]) == 0
    assert "also there: generator" in capsys.readouterr().out
    same(
        load_network(tmp_path / "s"),
        {name: tensor.bfloat16() for name, tensor in wan_state(1).items()},
    )
    assert main(["convert", str(original), str(tmp_path / "d"), "--to", "wan"]) == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("5GB", 5 * 10**9), ("1.5 gib", 3 * 2**29), ("700", 700), ("2MB", 2_000_000)],
)
def test_sizes_of_shards(text, num_bytes):
    """Catches powers of ten and of two mixed up: a 5GB shard must fit where 5 * 10^9 bytes do."""
    assert parse_bytes(text) == num_bytes
    for wrong in ("", "GB", "0GB", "-1GB", "5XB", "5 5"):
        with pytest.raises(WeightsError, match="such as 5GB"):
            parse_bytes(wrong)
