"""From Wan's folders and a student to a stream, with Wan's real classes at tiny size."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_wan import HEIGHT, RECIPE, WIDTH, save_wan_folder, tiny_parts, tiny_student
from y4m import y4m

from selfforcing_dfd.cli.main import main as command_line
from selfforcing_dfd.models.hub import HubError
from selfforcing_dfd.models.identity import SELF_FORCING, Recipe, mark, recipe_of, role_of
from selfforcing_dfd.streaming.load import load_settings, load_student
from selfforcing_dfd.streaming.load_wan import load_wan_model
from selfforcing_dfd.streaming.parts import LoadError, missing_files
from selfforcing_dfd.streaming.pipeline import CausalWanPipeline, export_scheduler
from selfforcing_dfd.streaming.session import StreamModel, StreamSession
from selfforcing_dfd.weights.write import convert

PROMPT = "a red disc moves left"
SIZE = ["--size", f"{HEIGHT}x{WIDTH}"]


def main(arguments: list[str]) -> int:
    """The exit code of `selfforcing-dfd stream` with these arguments."""
    return command_line(["stream", *arguments])


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wan_folder(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    CausalWanPipeline(tiny_student(), *tiny_parts(), export_scheduler(RECIPE)).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(autouse=True)
def text_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "selfforcing_dfd" / "text"


def frames(model: StreamModel, chunks: int = 2) -> torch.Tensor:
    session = StreamSession(model, PROMPT, load_settings("default", seed=5))
    return torch.cat([session.next_chunk().frames for _ in range(chunks)])


def test_an_export_streams_with_its_own_recipe(export):
    """Catches Self-Forcing's ladder and chunk forced on a student that was trained with others."""
    model = load_wan_model(export, size=(HEIGHT, WIDTH))
    assert model.ladder == RECIPE.sigmas
    assert model.chunk_frames == RECIPE.chunk_frames
    assert model.video_size == (HEIGHT, WIDTH)


def test_wans_folder_streams_with_a_student_from_elsewhere(wan, export):
    """Catches the folder's own bidirectional weights in place of the named student's."""
    own, mixed = (
        load_wan_model(*arguments, size=(HEIGHT, WIDTH))
        for arguments in ((export,), (wan, str(export)))
    )
    assert torch.equal(frames(mixed), frames(own))
    plain = load_wan_model(wan, str(export / "transformer"), size=(HEIGHT, WIDTH))
    assert torch.equal(frames(plain, 1), frames(own, 1))


def test_a_student_without_recipe_has_self_forcings(export, tmp_path):
    """Catches a ladder made up for students of which nothing is known but that they are causal."""
    student = tmp_path / "student"
    shutil.copytree(export / "transformer", student)
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k != "recipe"})
    )
    loaded = load_student(student)
    assert recipe_of(loaded.config) == Recipe((1000, 750, 500, 250), 5.0, 3, 21)
    assert SELF_FORCING.sigmas == pytest.approx((1, 0.9375, 5 / 6, 0.625))
    assert role_of(loaded.config) == "causal_student"


def test_a_self_forcing_checkpoint_streams(wan, export, tmp_path):
    """Catches published students whose names (FSDP changes them) or ladder do not arrive."""
    convert(export, tmp_path / "student.pt", "self-forcing")
    content = torch.load(tmp_path / "student.pt", weights_only=True)
    wrapped = {
        name.replace("model.", "model._fsdp_wrapped_module.", 1): t
        for name, t in content["generator"].items()
    }
    torch.save({"generator_ema": wrapped, "config": content["config"]}, tmp_path / "theirs.pt")
    theirs = load_wan_model(wan, str(tmp_path / "theirs.pt"), size=(HEIGHT, WIDTH))
    assert torch.equal(frames(theirs, 1), frames(load_wan_model(export, size=(HEIGHT, WIDTH)), 1))


def test_a_fake_score_is_no_student(export, tmp_path):
    """Catches the other network of a training checkpoint, which has the same names and sizes."""
    convert(export, tmp_path / "student.pt", "self-forcing")
    state = torch.load(tmp_path / "student.pt", weights_only=True)["generator"]
    torch.save({"generator": state, "critic": state}, tmp_path / "both.pt")
    with pytest.raises(HubError, match="bidirectional"):
        load_student(tmp_path / "both.pt", entry="critic")


def test_a_file_without_a_word_is_taken_for_what_it_is_named_as(export, tmp_path):
    """Catches single files refused for lack of a config: naming one as student says it is one."""
    convert(export, tmp_path / "loaded.safetensors", "single-file")
    loaded = load_student(tmp_path / "loaded.safetensors")
    assert recipe_of(loaded.config) == RECIPE
    with safe_open(tmp_path / "loaded.safetensors", "pt") as file:
        config = {**json.loads(file.metadata()["config"]), "_class_name": "WanTransformer"}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    bare = {key: value for key, value in config.items() if key not in ("role", "recipe")}
    save_file(tensors, tmp_path / "bare.safetensors", {"config": json.dumps(bare)})
    assert recipe_of(load_student(tmp_path / "bare.safetensors").config) == SELF_FORCING


def test_the_text_encoder_rests_when_prompts_are_known(export, text_cache, monkeypatch):
    """Catches eleven gigabytes that are loaded for a prompt whose embedding lies on the disk."""
    first = frames(load_wan_model(export, size=(HEIGHT, WIDTH)), 1)
    assert len(list(text_cache.rglob("*.safetensors"))) == 1
    monkeypatch.setattr("selfforcing_dfd.codecs.text.WanText.from_pretrained", None)
    assert torch.equal(frames(load_wan_model(export, size=(HEIGHT, WIDTH)), 1), first)


def test_wans_folder_alone_is_no_student(wan):
    """Catches the bidirectional transformer used as a student.

    The error names the command that gets the published student.
    """
    with pytest.raises(LoadError) as error:
        load_wan_model(wan)
    message = str(error.value)
    assert "student: Wan's own transformer is bidirectional" in message
    assert "hf download gdhe17/Self-Forcing checkpoints/self_forcing_dmd.pt --local-dir" in message
    assert "--weights" in message
    assert "--include" not in message, "nothing else is missing"


def test_a_teachers_folder_named_as_student_is_refused(wan, export):
    """Catches `--weights WAN`, which fits tensor by tensor."""
    with pytest.raises(HubError, match="bidirectional"):
        load_wan_model(export, str(wan / "transformer"), size=(HEIGHT, WIDTH))


def test_all_that_is_missing_is_listed_at_once(export, tmp_path):
    """Catches errors that come one a run, and the missing one of several shards."""
    half = tmp_path / "half 14B"
    shutil.copytree(export / "vae", half / "vae")
    (half / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    (half / "text_encoder").mkdir()
    shutil.copy(export / "text_encoder" / "config.json", half / "text_encoder")
    index = {
        "weight_map": {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00002-of-00002.safetensors",
        }
    }
    (half / "text_encoder" / "model.safetensors.index.json").write_text(json.dumps(index))
    (half / "text_encoder" / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(LoadError) as error:
        load_wan_model(half, "nowhere.pt")
    for wanted in (
        "vae: *.safetensors",
        "text_encoder: model-00002-of-00002.safetensors",
        "tokenizer: tokenizer.json",
        f"hf download Wan-AI/Wan2.1-T2V-14B-Diffusers --include 'vae/*' --local-dir '{half}'",
        "student: nowhere.pt does not exist",
    ):
        assert wanted in str(error.value)
    assert missing_files(export, "text_encoder") == []


def test_parts_of_two_models_are_refused(export, tmp_path):
    """Catches a matrix product that fails minutes later, deep inside."""
    other = tmp_path / "other"
    shutil.copytree(export, other)
    config = other / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"d_model": 32', '"d_model": 64'))
    with pytest.raises(LoadError, match="text_encoder has d_model 64, the student wants 32"):
        load_wan_model(other, size=(HEIGHT, WIDTH))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (480, 830)}, "width is 830; the model needs multiples of 16: use 816 or 832"),
        ({"dtype": "fp8"}, "dtype is 'fp8'; use auto, float32"),
    ],
)
def test_mistakes_are_found_before_weights_are_read(export, monkeypatch, options, message):
    """Catches a typing mistake that costs minutes: reading weights is the next error here."""
    monkeypatch.setattr("selfforcing_dfd.streaming.load.load_network", None)
    with pytest.raises(LoadError, match=message):
        load_wan_model(export, **options)


def test_the_command_line_streams_an_export(export, tmp_path, capsys):
    """Catches options that do not arrive; the file holds what the session makes."""
    out = tmp_path / "s.y4m"
    options = [
        "--model",
        str(export),
        *SIZE,
        "--prompt",
        PROMPT,
        "--chunks",
        "2",
        "--seed",
        "5",
        "--out",
        str(out),
    ]
    assert main(options) == 0
    assert out.read_bytes() == y4m(frames(load_wan_model(export, size=(HEIGHT, WIDTH))))
    printed = capsys.readouterr().err
    assert f"{WIDTH} x {HEIGHT} pixels, float32" in printed
    assert "K = 12 latent frames (sink 3 + window 9" in printed


def test_the_command_line_takes_a_dtype(export, tmp_path, capsys):
    """Catches --dtype and --vae-device that are parsed and forgotten."""
    options = [
        "--model",
        str(export),
        *SIZE,
        "--dtype",
        "bfloat16",
        "--vae-device",
        "cpu",
        "--chunks",
        "1",
    ]
    assert main([*options, "--out", str(tmp_path / "s.y4m")]) == 0
    assert "bfloat16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "64x64", "--dtype", "float32"], "--size, --dtype without --model"),
        (["--model", "nowhere", "--run", "x"], "both --model and --run"),
        (["--model", "nowhere"], "nowhere cannot be streamed from yet; it lacks"),
    ],
)
def test_options_that_do_not_go_together_are_explained(
    tmp_path, monkeypatch, capsys, arguments, message
):
    """Catches a traceback, and options that are quietly ignored."""
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_mark_is_what_makes_a_file_a_student(export):
    """Catches `load_student` results that a pipeline would then refuse."""
    student = load_student(export)
    CausalWanPipeline(student, *tiny_parts(), export_scheduler(RECIPE))
    mark(student, "causal_student", SELF_FORCING)
    assert recipe_of(student.config) == SELF_FORCING
